"""Keep gathered parameters from the forward to the backward where the memory budget has room for them.

    fwd %w_full = reshard(%w)                      fwd %w_full = reshard(%w)
    ...                                      ->    ...
    bwd %w_again = reshard(%w)                     bwd %dx = aten.mm.default(%t, %w_full)
    bwd %dx = aten.mm.default(%t, %w_again)

Every byte kept is a byte that is not sent again. The last layers come first: they are needed again soonest, and hold
their memory for the shortest time. Without a budget nothing is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zgraph.ir import Graph, Node, Phase
from zgraph.ir.ops import padded_bytes
from zgraph.passes.analysis.gathers import gathered, is_gather
from zgraph.passes.analysis.lookahead import lowered
from zgraph.passes.analysis.timetable import HeadroomTree
from zgraph.passes.core.base import Context, Pass
from zgraph.passes.dce import DeadCode


@dataclass(frozen=True)
class Keep(Pass):
    """Keep gathered parameters from the forward to the backward where the memory budget has room for them.

    Args:
        num_ahead: room is left for this many of the largest collectives, so that they can run ahead.
    """

    num_ahead: int = 2

    name: ClassVar[str] = "keep"
    requires: ClassVar[frozenset[str]] = frozenset({"placed"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"lowered"})

    def __post_init__(self) -> None:
        if self.num_ahead < 0:
            raise ValueError("num_ahead must be 0 or more")

    def run(self, graph: Graph, context: Context) -> Graph:
        pairs = _gathered_twice(graph)
        if context.step_bytes is None or not pairs:
            return graph
        kept = self._affordable(graph, context.fitting, pairs)
        renamed = {again.results[0].name: full.results[0] for full, again in kept}
        again = {second.name for _, second in kept}
        nodes = [n.substitute(renamed) for n in graph.nodes if n.name not in again]
        return DeadCode().run(graph.with_nodes(nodes), context)

    def _affordable(self, graph: Graph, context: Context, pairs: list[tuple[Node, Node]]) -> list[tuple[Node, Node]]:
        step, limit = lowered(graph, context), context.step_bytes
        _, curve = step.plain
        if limit is None or curve.peak.total_bytes > limit:
            return []
        ahead_bytes = step.ahead_bytes(self.num_ahead)
        headroom = HeadroomTree([max(r - ahead_bytes, 0) for r in step.headroom_beside(curve, 0)])
        kept = []
        pairs = [pair for pair in pairs if all(step.is_read(node.name) for node in pair)]
        for full, again in sorted(pairs, key=lambda pair: step.uses(pair[1].name)):
            begin, end = step.uses(full.name)[1] + 1, step.uses(again.name)[0]
            num_bytes = padded_bytes(full.operands[0].tensor, graph.num_shards)
            if headroom.last_below(num_bytes, end) < begin:
                headroom.take(num_bytes, begin, end)
                kept.append((full, again))
        return kept


def _gathered_twice(graph: Graph) -> list[tuple[Node, Node]]:
    """The gathers of one parameter in the forward and in the backward."""
    forward: dict[str, Node] = {}
    pairs = []
    for node in graph.nodes:
        if not is_gather(graph, node):
            continue
        source = gathered(graph, node)
        if node.phase is Phase.forward:
            forward[source] = node
        elif source in forward and forward[source].results[0].type == node.results[0].type:
            pairs.append((forward[source], node))
    return pairs
