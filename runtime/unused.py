"""Gradients of parameters behind outputs that nobody differentiates: none, as in eager PyTorch, not zeros.

torch.compile makes zeros for outputs without a gradient, so that the parameters behind them alone would have gradients
of zero, and weight decay would move them. Here what comes of such zeros alone is left out; on several ranks, where all
of them would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from zgraph.bridge.aten import TO_TORCH
from zgraph.ir import Graph, InputKind, Output, OutputKind, Plan, TensorType
from zgraph.runtime.gradients import is_unreduced
from zgraph.runtime.session import Session

Tangents = frozenset[str]


def tangents_behind(graph: Graph) -> Mapping[str, Tangents]:
    """The tangents that each gradient is made of, by the name of its input, where these are not all of them.

    Args:
        graph: as it was captured: what passes pack into one bucket comes of all its members.
    """
    tangents = [i.value.name for i in graph.inputs if i.kind is InputKind.tangent]
    behind: dict[str, Tangents] = {name: frozenset([name]) for name in tangents}
    nothing: Tangents = frozenset()
    for node in graph.nodes:
        found = nothing.union(*(behind.get(v.name, nothing) for v in node.operands))
        if found:
            behind.update({r.name: found for r in node.results})
    gradients = [o for o in graph.outputs if o.kind is OutputKind.grad and o.value is not None and o.target]
    made = {o.target: behind.get(o.value.name, nothing) for o in gradients if o.value is not None and o.target}
    return {name: found for name, found in made.items() if 0 < len(found) < len(tangents)}


def absent_tangents(
    kinds: Sequence[TensorType], outputs: Sequence[Any], gradients: Sequence[torch.Tensor | None]
) -> frozenset[int]:
    """The tangents, by position, whose outputs have no gradient.

    Not every output of a compiled forward has a tangent, and torch does not say which have. They are matched by shape
    and dtype, in their order; where that leaves a choice, none is taken for absent.

    Args:
        kinds: the types of the tangents.
        outputs: metadata of the outputs, as an autograd node has it.
        gradients: of the outputs.
    """
    first, last = _matched(kinds, outputs), _matched(kinds[::-1], outputs[::-1])
    if first is None or last is None or first != [len(outputs) - 1 - index for index in reversed(last)]:
        return frozenset()
    return frozenset(position for position, index in enumerate(first) if gradients[index] is None)


def _matched(kinds: Sequence[TensorType], outputs: Sequence[Any]) -> list[int] | None:
    """For each tangent the first output, behind those of the tangents before it, that may be its own."""
    found: list[int] = []
    for index, output in enumerate(outputs):
        if len(found) < len(kinds) and _may_be(kinds[len(found)], output):
            found.append(index)
    return found if len(found) == len(kinds) else None


def _may_be(kind: TensorType, output: Any) -> bool:
    if TO_TORCH[kind.dtype] != output.dtype or len(kind.shape) != len(output.shape):
        return False
    return all(not isinstance(d, int) or d == size for d, size in zip(kind.shape, output.shape, strict=True))


class Unused:
    """Tells which gradients of parameters a backward leaves out.

    Args:
        session: whose ranks.
        plan: the plan.
        outputs: what the backward returns.
        behind: see `tangents_behind`.
    """

    def __init__(self, session: Session, plan: Plan, outputs: Sequence[Output], behind: Mapping[str, Tangents]) -> None:
        self.session = session
        names = {i.value.name: i.target for i in plan.graph.params}
        found = [(index, o) for index, o in enumerate(outputs) if o.kind is OutputKind.grad and o.target in names]
        self.watched = {
            index: (behind[o.target], session.store.slots[names[o.target]])
            for index, o in found
            if o.target in behind and names[o.target] in session.store.slots
        }
        self.tangents = [i.value.name for i in plan.graph.inputs if i.kind is InputKind.tangent]

    def of_this_backward(self) -> set[int]:
        """The results to leave out, by position. All ranks ask in each backward of a plan that has such outputs."""
        if not self.watched:
            return set()
        absent = {self.tangents[position] for position in self.session.absent}
        self.session.absent = frozenset()  # of this backward alone: the next may not be watched
        mine = [behind <= absent and not is_unreduced(slot) for behind, slot in self.watched.values()]
        if not self.session.is_alone:
            everywhere = torch.tensor(mine, dtype=torch.uint8, device=self.session.device)
            work = dist.all_reduce(everywhere, dist.ReduceOp.MIN, group=self.session.group, async_op=True)
            self.session.peers.wait(work, "which outputs are differentiated")
            mine = [bool(word) for word in everywhere.tolist()]
        return {index for index, unused in zip(self.watched, mine, strict=True) if unused}
