"""Lower reshards of gradients that every rank keeps whole into all-reduces.

    bwd %g_mean: f32[64, 32]<R> = reshard(%g)                      where %g: f32[64, 32]<P(mean)>
->
    bwd %g_mean_start: future f32[64, 32]<R> = all_reduce_start(%g)
    bwd %g_mean: f32[64, 32]<R> = wait(%g_mean_start)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zgraph.ir import Graph, Node, Replicate
from zgraph.passes.analysis.lowering import lower, reduces
from zgraph.passes.core.base import Context, Numerics, Pass


@dataclass(frozen=True)
class AllReduce(Pass):
    """Lower reshards of gradients that every rank keeps whole into all-reduces."""

    name: ClassVar[str] = "all-reduce"
    numerics: ClassVar[Numerics] = Numerics.reassociates
    requires: ClassVar[frozenset[str]] = frozenset({"placed"})
    provides: ClassVar[frozenset[str]] = frozenset({"lowered"})

    def run(self, graph: Graph, context: Context) -> Graph:
        def wanted(node: Node) -> bool:
            return reduces(node, Replicate(), "sum", "mean")

        return lower(graph, wanted, "all_reduce_start", self.name)
