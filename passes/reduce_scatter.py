"""Lower reshards of gradients into shards to reduce-scatters.

    bwd %g_mean: f32[64, 32]<S0> = reshard(%g)                     where %g: f32[64, 32]<P(mean)>
->
    bwd %g_mean_start: future f32[64, 32]<S0> = reduce_scatter_start(%g)
    bwd %g_mean: f32[64, 32]<S0> = wait(%g_mean_start)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zgraph.ir import Graph, Node, Shard
from zgraph.passes.analysis.lowering import lower, reduces
from zgraph.passes.core.base import Context, Numerics, Pass


@dataclass(frozen=True)
class ReduceScatter(Pass):
    """Lower reshards of gradients into shards to reduce-scatters.

    Args:
        grouped: a bucket is one call that moves its members from and to where they are; else they are packed, but
            where the context says that the runtime groups calls.
    """

    grouped: bool = False

    name: ClassVar[str] = "reduce-scatter"
    numerics: ClassVar[Numerics] = Numerics.reassociates
    requires: ClassVar[frozenset[str]] = frozenset({"placed"})
    provides: ClassVar[frozenset[str]] = frozenset({"lowered"})

    def run(self, graph: Graph, context: Context) -> Graph:
        def wanted(node: Node) -> bool:
            return reduces(node, Shard(0), "sum", "mean")

        return lower(graph, wanted, "reduce_scatter_start", self.name, grouped=self.grouped or context.groups_calls)
