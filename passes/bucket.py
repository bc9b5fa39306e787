"""Merge reshards of small values into buckets; large ones move alone, without a copy.

    fwd %a_full = reshard(%a)                      fwd %a_full, %b_full = reshard(%a, %b)
    ...                                      ->    ...
    fwd %b_full = reshard(%b)

A bucket of gathers stands where its first member is needed, a bucket of gradients where its last one is made. Buckets
that a memory budget has no room for are not made.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import ClassVar

from zgraph.ir import Graph, Node
from zgraph.ir.ops import padded_bytes
from zgraph.passes.analysis.gathers import casts_before, is_gather
from zgraph.passes.analysis.lookahead import makespan_us, step_memory
from zgraph.passes.analysis.lowering import placement_change
from zgraph.passes.analysis.order import reorder
from zgraph.passes.core.base import Context, Pass

LATENCIES = 20
"""A bucket's bytes take this many times as long as its latency."""
SMALLEST_BYTES = 64 << 10
LARGEST_BYTES = 256 << 20


@dataclass(frozen=True)
class Bucket(Pass):
    """Merge reshards of small values into buckets; large ones move alone, without a copy.

    Args:
        max_bytes: a bucket is full at this size, padding counted. 0 leaves it to the costs: as large as makes the
            latency of a collective small beside its bytes, or larger or smaller if the step is faster then.
        pack_below_bytes: values of at least this size are left alone. 0 leaves it to the costs: a value is packed if
            its bytes take less time than the latency that packing saves it.
    """

    max_bytes: int = 0
    pack_below_bytes: int = 0

    name: ClassVar[str] = "bucket"
    requires: ClassVar[frozenset[str]] = frozenset({"placed"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"lowered"})

    def run(self, graph: Graph, context: Context) -> Graph:
        latency_bytes = _latency_bytes(graph, context)
        below = self.pack_below_bytes or max(latency_bytes, SMALLEST_BYTES)
        if self.max_bytes:
            return self.merged(graph, self.groups(graph, self.max_bytes, below))
        usual = min(max(LATENCIES * latency_bytes, 2 * below), LARGEST_BYTES)
        choices: dict[Hashable, list[list[int]]] = {}
        for max_bytes in (usual, usual // 4, 4 * usual):
            groups = self.groups(graph, max_bytes, below)
            choices.setdefault(tuple(map(tuple, groups)), groups)
        graphs = [self.merged(graph, groups) for groups in choices.values()]
        if context.step_bytes is None:
            return min(graphs, key=lambda g: makespan_us(g, context)) if len(graphs) > 1 else graphs[0]
        found = [(g, step_memory(g, context)) for g in graphs]
        fitting = [(g, memory) for g, memory in found if memory.peak.total_bytes <= context.step_bytes]
        if not fitting:
            return min((*found, (graph, step_memory(graph, context))), key=lambda pair: pair[1].peak.total_bytes)[0]
        return (
            min(fitting, key=lambda pair: makespan_us(pair[0], context, pair[1]))[0]
            if len(fitting) > 1
            else fitting[0][0]
        )

    def merged(self, graph: Graph, groups: list[list[int]]) -> Graph:
        """The graph with each group of reshards as one."""
        groups = [group for group in groups if len(group) > 1]
        if not groups:
            return graph
        bucket_of = {position: group for group in groups for position in group}
        stands_at: dict[str, int] = {}
        for group in groups:
            if is_gather(graph, graph.nodes[group[0]]):  # with the casts of all members
                names = {name for p in group for name in (graph.nodes[p].name, *casts_before(graph, graph.nodes[p]))}
                stands_at.update(dict.fromkeys(names, group[0]))
        nodes: list[Node] = []
        priority: list[float] = []
        for position, node in enumerate(graph.nodes):
            members = bucket_of.get(position)
            if members is None or position == members[-1]:
                nodes.append(node if members is None else _merged([graph.nodes[p] for p in members]))
                priority.append(stands_at.get(node.name, position))
        return reorder(graph.with_nodes(nodes), lambda position, _: priority[position])

    def groups(self, graph: Graph, max_bytes: int, below_bytes: int) -> list[list[int]]:
        """Positions of the reshards that go together, each group in program order."""
        full: list[list[int]] = []
        filling: dict[Hashable, tuple[list[int], int]] = {}
        for position, node in enumerate(graph.nodes):
            if placement_change(node) is None or len(node.results) > 1:
                continue
            kind = node.operands[0].tensor
            size = padded_bytes(kind, graph.num_shards)
            if size >= below_bytes:
                continue
            key = (node.phase, kind.dtype, kind.placement, kind.space, node.results[0].tensor.placement, node.kwargs)
            group, filled = filling.get(key, ([], 0))
            if filled + size > max_bytes and group:
                full.append(group)
                group, filled = [], 0
            filling[key] = ([*group, position], filled + size)
        return full + [group for group, _ in filling.values()]


def _latency_bytes(graph: Graph, context: Context) -> int:
    """The whole that a gather would move in the time that its latency takes."""
    if graph.num_shards == 1:
        return 0
    network = context.costs.gather_alpha_beta(graph.mesh)
    sent = network.latency_us * network.bytes_per_s / 1e6
    return int(sent * graph.num_shards / (graph.num_shards - 1))


def _merged(nodes: list[Node]) -> Node:
    first, args = nodes[0], tuple(a for n in nodes for a in n.args)
    origin = replace(first.origin, made_by=Bucket.name)
    return replace(first, args=args, results=tuple(r for n in nodes for r in n.results), origin=origin)
