"""Lower reshards from shards to the whole into all-gathers.

    fwd %w_full: f32[64, 32]<R> = reshard(%w)
->
    fwd %w_full_start: future f32[64, 32]<R> = all_gather_start(%w)
    fwd %w_full: f32[64, 32]<R> = wait(%w_full_start)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zgraph.ir import Graph, Node, Replicate, Shard
from zgraph.passes.analysis.lowering import lower, placement_change
from zgraph.passes.core.base import Context, Pass


@dataclass(frozen=True)
class AllGather(Pass):
    """Lower reshards from shards to the whole into all-gathers.

    Args:
        grouped: a bucket is one call that moves its members from and to where they are; else they are packed, but
            where the context says that the runtime groups calls.
    """

    grouped: bool = False

    name: ClassVar[str] = "all-gather"
    requires: ClassVar[frozenset[str]] = frozenset({"placed"})
    provides: ClassVar[frozenset[str]] = frozenset({"lowered", "gathered"})

    def run(self, graph: Graph, context: Context) -> Graph:
        def wanted(node: Node) -> bool:
            return placement_change(node) == (Shard(0), Replicate())

        return lower(graph, wanted, "all_gather_start", self.name, grouped=self.grouped or context.groups_calls)
