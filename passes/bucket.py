"""Merge reshards of small values into buckets; large ones move alone, without a copy.

    fwd %a_full = reshard(%a)                      fwd %a_full, %b_full = reshard(%a, %b)
    ...                                      ->    ...
    fwd %b_full = reshard(%b)

A bucket of gathers stands where its first member is needed, a bucket of gradients where its last one is made.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import ClassVar

from zgraph.ir import Graph, Node, Shard
from zgraph.ir.ops import padded_bytes
from zgraph.passes.analysis.order import reorder
from zgraph.passes.base import Context, Pass


@dataclass(frozen=True)
class Bucket(Pass):
    """Merge reshards of small values into buckets; large ones move alone, without a copy.

    Args:
        max_bytes: a bucket is full at this size, padding counted.
        pack_below_bytes: values of at least this size are left alone.
    """

    max_bytes: int = 4 << 20
    pack_below_bytes: int = 512 << 10

    name: ClassVar[str] = "bucket"
    requires: ClassVar[frozenset[str]] = frozenset({"placed"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"lowered"})

    def run(self, graph: Graph, context: Context) -> Graph:
        groups = [g for g in self.groups(graph) if len(g) > 1]
        if not groups:
            return graph
        bucket_of = {position: group for group in groups for position in group}
        nodes: list[Node] = []
        priority: list[float] = []
        for position, node in enumerate(graph.nodes):
            group = bucket_of.get(position)
            if group is None:
                nodes.append(node)
                priority.append(position)
            elif position == group[-1]:
                nodes.append(_merged([graph.nodes[p] for p in group]))
                priority.append(group[0] if _is_gather(node) else position)
        return reorder(graph.with_nodes(nodes), lambda position, _: priority[position])

    def groups(self, graph: Graph) -> list[list[int]]:
        """Positions of the reshards that go together, each group in program order."""
        full: list[list[int]] = []
        filling: dict[Hashable, tuple[list[int], int]] = {}
        for position, node in enumerate(graph.nodes):
            size = padded_bytes(node.operands[0].tensor, graph.num_ranks) if node.op == "reshard" else 0
            if node.op != "reshard" or len(node.results) > 1 or size >= self.pack_below_bytes:
                continue
            kind = node.operands[0].tensor
            key = (node.phase, kind.dtype, kind.placement, node.results[0].tensor.placement, node.kwargs)
            group, filled = filling.get(key, ([], 0))
            if filled + size > self.max_bytes and group:
                full.append(group)
                group, filled = [], 0
            filling[key] = ([*group, position], filled + size)
        return full + [group for group, _ in filling.values()]


def _is_gather(node: Node) -> bool:
    return isinstance(node.operands[0].tensor.placement[0], Shard)


def _merged(nodes: list[Node]) -> Node:
    args = tuple(a for n in nodes for a in n.args)
    origin = replace(nodes[0].origin, made_by=Bucket.name)
    return replace(nodes[0], args=args, results=tuple(r for n in nodes for r in n.results), origin=origin)
