"""How far whole numbers that a graph is given may go: those that choose rows of something, by what they choose from.

Each number is followed from where it chooses back to the input that it comes from, and what it may be there follows
from what was done on the way:

    fwd %p = aten.add.Tensor(%ids, 2)           %ids from -2 to 7
    fwd %e = aten.embedding.default(%w, %p)     %p from 0 to 9, where %w has ten rows
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from zgraph.debugging.paths import Interval, Known, Path, Paths
from zgraph.ir import Graph, Node, TensorType
from zgraph.ir.graph import Arg, Value


@dataclass(frozen=True)
class Span:
    """Whole numbers from `low` to `high`, both included, and others beside them that whoever reads them leaves out."""

    low: int
    high: int
    beside: frozenset[int] = frozenset()

    def within(self, low: int, high: int) -> Span:
        """Those of a dtype that goes from `low` to `high`."""
        return Span(max(self.low, low), min(self.high, high), frozenset(n for n in self.beside if low <= n <= high))


def spans(graph: Graph, sizes: Mapping[str, int]) -> dict[str, Span]:
    """For inputs that index something: the numbers that they may be. Inputs used in another way only are left out.

    Args:
        graph: whose inputs to look at.
        sizes: a number for each symbolic size; sizes that are not there are not known.
    """
    known = Known(sizes)
    paths = Paths(graph, known)
    wanted: dict[str, list[Span]] = {}
    for node in graph.nodes:
        for index, size, left_out in _indexed(node, known):
            for path in paths.of(index):
                if (span := _at_root(path, size, left_out)) is not None:
                    wanted.setdefault(path.root, []).append(span)
        paths.follow(node)
    return {name: span for name, each in wanted.items() if (span := _common(each)) is not None}


def _at_root(path: Path, size: int, left_out: int | None) -> Span | None:
    """Numbers that an input may have so that the index made of it is below a size; None where any will do."""
    found, beside = path.undo(Interval(0, size - 1)), path.replaced
    if left_out is not None and (there := path.undo(Interval(left_out, left_out)).only) is not None:
        beside |= {there}
    return None if found.low is None or found.high is None else Span(found.low, found.high, beside)


def _common(wanted: list[Span]) -> Span | None:
    """Numbers that all uses allow; None where there are none."""
    low, high = max(s.low for s in wanted), min(s.high for s in wanted)
    beside = {n for span in wanted for n in span.beside if not low <= n <= high}
    allowed = frozenset(n for n in beside if all(s.low <= n <= s.high or n in s.beside for s in wanted))
    return Span(low, high, allowed) if low <= high else None


def drawn(count: int, bound: int, turn: int, random: torch.Generator) -> torch.Tensor:
    """Numbers from 0 below a bound in any order: all of them where there are enough, else others at each turn."""
    numbers = (torch.arange(count) + turn * count) % bound
    return numbers[torch.randperm(count, generator=random)]


def drawn_from(span: Span, count: int, turn: int, random: torch.Generator) -> torch.Tensor:
    """Numbers of a span in any order, all of them if there is room; a few that are left out, but never all."""
    numbers = drawn(count, span.high - span.low + 1, turn, random) + span.low
    if span.beside and count > 1:
        others = torch.tensor(sorted(span.beside))
        spare = count - (span.high - span.low + 1)
        few = min(max(count // 8, 1), spare) if spare > 0 else min(max(count // 8, 1), count // 2)
        places = _spare_places(numbers, few)
        numbers[places] = others[(torch.arange(len(places)) + turn) % len(others)]
    return numbers


def _spare_places(numbers: torch.Tensor, count: int) -> torch.Tensor:
    """Places of numbers that come again elsewhere, or any where there are too few."""
    order = numbers.argsort(stable=True)
    again = order[1:][numbers[order][1:] == numbers[order][:-1]]
    places = torch.cat([again, torch.arange(len(numbers))])
    return torch.tensor(list(dict.fromkeys(places.tolist()))[:count], dtype=torch.long)


# --- what indexes ------------------------------------------------------------------------------------------------

_BY_DIM = frozenset(
    f"aten.{name}"
    for name in (
        "index_select.default", "gather.default", "scatter.src", "scatter.value", "scatter_add.default",
        "index_add.default", "index_copy.default", "scatter_reduce.two", "index_fill.int_Scalar",
    )
)  # fmt: skip
"""Ops of a tensor, a dim, and what indexes that dim."""

_LOSSES = frozenset({"aten.nll_loss_forward.default", "aten.nll_loss2d_forward.default"})
_INDICES = frozenset({"aten.index.Tensor", "aten.index_put.default", "aten._unsafe_index.Tensor"})

_Use = tuple[Value, int, int | None]
"""Use of an index: the index, the size of the dimension it chooses from, and a number that is left out."""


def _indexed(node: Node, known: Known) -> Iterator[_Use]:
    match node.op, node.args:
        case "aten.embedding.default", (Value() as rows, Value() as index, *_):
            yield from _sized(known, rows, 0, index)
        case op, (Value() as rows, int(dim), Value() as index, *_) if op in _BY_DIM:
            yield from _sized(known, rows, dim, index)
        case op, (Value() as rows, Value() as index, _, _, int(left_out), *_) if op in _LOSSES:
            yield from _sized(known, rows, 1 if len(rows.tensor.shape) > 1 else 0, index, left_out)
        case "zgraph.cross_entropy.default", (Value() as rows, Value() as index, int(left_out), *_):
            yield from _sized(known, rows, -1, index, left_out)
        case "zgraph.linear_cross_entropy.default", (_, Value() as rows, Value() as index, int(left_out), *_):
            yield from _sized(known, rows, 0, index, left_out)
        case "aten.take.default", (Value() as rows, Value() as index):
            if (size := known.number(rows.tensor.numel)) is not None:
                yield index, size, None
        case (("aten.one_hot.default" | "aten.embedding_dense_backward.default"), args):
            at = 0 if node.op == "aten.one_hot.default" else 1
            size, chosen = known.arg(args[at + 1]), args[at]
            if size is not None and size > 0 and isinstance(chosen, Value):
                yield chosen, size, None
        case op, (Value() as rows, tuple(indices), *_) if op in _INDICES:
            for dim, other in enumerate(indices):
                yield from _sized(known, rows, dim, other)


def _sized(known: Known, rows: Value, dim: int, index: Arg, left_out: int | None = None) -> Iterator[_Use]:
    shape = rows.type.shape if isinstance(rows.type, TensorType) else ()
    if isinstance(index, Value) and -len(shape) <= dim < len(shape):
        if size := known.number(shape[dim]):
            yield index, size, left_out
