"""How ops run in a check: random ones draw what those of the captured graph draw, whatever became of the graph.

A draw is a separate number: what a node draws follows from the seed of the micro-step, the rank, and which of the
captured graph's draws the node stands for. Dropouts draw as those of generated kernels do, from a seed and a position
(`zgraph.codegen.philox`), fused or not: so that a fused dropout drops what the captured one does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any

import torch

from zgraph.bridge.aten import resolve
from zgraph.codegen import library as _kernels  # noqa: F401 - registers the ops
from zgraph.codegen.philox import uniform
from zgraph.ir import DType, ExternalOp, Graph, Node, TensorType
from zgraph.ir.external_ops import DROPOUT, SEED
from zgraph.ir.ops import is_pure, views

SAME_DRAWS = frozenset({DROPOUT, SEED})
"""Ops that draw the same in every dtype."""

FLOATS = frozenset({DType.f64, DType.f32, DType.f16, DType.bf16})

_RANKS_APART, _DRAWS_APART = 1_000_003, 7_919
"""Seeds of ranks and of draws are this far apart."""

Disturb = Callable[[torch.Tensor], torch.Tensor]


def draw_numbers(captured: Graph, graph: Graph) -> dict[str, int]:
    """Which of the draws of a captured graph each node of a later one stands for, by the node's name.

    The seed of a fused dropout is named after it, and may be drawn elsewhere; all others keep their order.
    """
    names = {name: number for number, name in enumerate(_drawing(captured))}
    found: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == SEED and (source := _named_after(node.name, names)):
            found[node.name] = names[source]
    taken = frozenset(found.values())
    free = (n for n in count() if n not in taken)
    for name in _drawing(graph):
        if name not in found:
            found[name] = next(free)
    return found


def _drawing(graph: Graph) -> list[str]:
    return [n.name for n in graph.nodes if n.op in graph.foreign and graph.foreign[n.op].random]


def _named_after(seed: str, names: Mapping[str, int]) -> str:
    """The dropout that a seed is of, or the seed itself; empty where it is not known."""
    known = [name for name in names if seed == name or seed.startswith(f"{name}_seed")]
    return max(known, key=len, default="")


class Drawing:
    """Runs ops of torch for a check.

    Args:
        numbers: which draw each random node stands for.
        seed: of the micro-step.
        graph: what runs.
        disturb: changes the operands of ops that compute; None leaves them.
    """

    def __init__(self, numbers: Mapping[str, int], seed: int, graph: Graph, disturb: Disturb | None = None) -> None:
        self.numbers, self.seed, self.graph, self.disturb = numbers, seed, graph, disturb

    def __call__(self, node: Node, row: ExternalOp, rank: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if row.random:
            number = self.numbers.get(node.name, self.numbers.get(node.name.removesuffix(".own"), 0))
            seed = self.seed + _RANKS_APART * rank + _DRAWS_APART * number
            torch.default_generator.manual_seed(seed)
            return dropout(*args, **kwargs) if node.op == DROPOUT else resolve(node.op)(*args, **kwargs)
        if self.disturb is not None and self._computes(node):
            args = [self._disturbed(a) for a in args]
        return resolve(node.op)(*args, **kwargs)

    def _computes(self, node: Node) -> bool:
        """Whether a node makes numbers that are rounded, rather than a view, a comparison, or what it writes to."""
        if not is_pure(self.graph, node) or views(self.graph, node):
            return False
        return all(isinstance(r.type, TensorType) and r.type.dtype in FLOATS for r in node.results)

    def _disturbed(self, arg: Any) -> Any:
        assert self.disturb is not None
        if isinstance(arg, torch.Tensor):
            return self.disturb(arg) if arg.is_floating_point() else arg
        return [self._disturbed(a) for a in arg] if isinstance(arg, list) else arg


def dropout(x: torch.Tensor, p: float, train: bool | None = True) -> tuple[torch.Tensor, torch.Tensor]:
    """`aten.native_dropout`, which draws as generated kernels do."""
    kept = torch.empty_like(x, dtype=torch.bool)
    if train is False:
        return x.clone(), kept.fill_(True)
    seed = torch.ops.zgraph.seed.default(x)
    kept.copy_(uniform(seed, x.numel()).view(x.shape) > p)
    return x.mul(kept).mul_(0.0 if p == 1 else 1 / (1 - p)), kept
