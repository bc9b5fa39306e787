"""How far whole numbers that a graph is given may go: those that choose rows of something, by what they choose from."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from zgraph.ir import Graph, Node, TensorType
from zgraph.ir.graph import Arg, Value
from zgraph.ir.symbols import Dim

_SAME = frozenset(
    f"aten.{name}"
    for name in (
        "view.default", "_unsafe_view.default", "reshape.default", "expand.default", "slice.Tensor", "select.int",
        "unsqueeze.default", "squeeze.default", "squeeze.dim", "squeeze.dims", "clone.default", "alias.default",
        "detach.default", "_to_copy.default", "to.dtype", "t.default", "transpose.int", "permute.default",
        "contiguous.default", "constant_pad_nd.default",
    )
)  # fmt: skip
"""Ops whose result has the whole numbers of their first operand, and perhaps one that is the same for all inputs."""

_WHERE = "aten.where.self"


def bounds(graph: Graph) -> dict[str, list[Dim]]:
    """For inputs that index something: sizes of what they index, none of which they may reach.

    The uses of each are followed through views and casts. Inputs that are used in another way only are left out.
    """
    roots = {i.value.name: i.value.name for i in graph.inputs}
    found: dict[str, list[Dim]] = {}
    for node in graph.nodes:
        for index, size in _indexed(node):
            if index.name in roots:
                found.setdefault(roots[index.name], []).append(size)
        source = node.args[1] if node.op == _WHERE else node.args[0] if node.op in _SAME and node.args else None
        if isinstance(source, Value) and source.name in roots and len(node.results) == 1:
            roots[node.results[0].name] = roots[source.name]
    return found


def drawn(count: int, bound: int, turn: int, random: torch.Generator) -> torch.Tensor:
    """Numbers from 0 below a bound in any order: all of them where there are enough, else others at each turn."""
    numbers = (torch.arange(count) + turn * count) % bound
    return numbers[torch.randperm(count, generator=random)]


def _indexed(node: Node) -> Iterator[tuple[Value, Dim]]:
    """What a node indexes with, and the size of what each chooses from."""
    match node.op, node.args:
        case "aten.embedding.default", (Value() as rows, Value() as index, *_):
            yield from _sized(rows, 0, index)
        case (("aten.index_select.default" | "aten.gather.default"), (Value() as rows, int(dim), Value() as index, *_)):
            yield from _sized(rows, dim, index)
        case ("aten.nll_loss_forward.default" | "aten.nll_loss2d_forward.default"), (
            Value() as rows, Value() as index, *_,
        ):  # fmt: skip
            yield from _sized(rows, 1 if len(_shape(rows)) > 1 else 0, index)
        case "aten.index.Tensor", (Value() as rows, tuple(indices), *_):
            for dim, other in enumerate(indices):
                yield from _sized(rows, dim, other)


def _sized(rows: Value, dim: int, index: Arg) -> Iterator[tuple[Value, Dim]]:
    shape = _shape(rows)
    if isinstance(index, Value) and -len(shape) <= dim < len(shape):
        yield index, shape[dim]


def _shape(value: Value) -> tuple[Dim, ...]:
    return value.type.shape if isinstance(value.type, TensorType) else ()
