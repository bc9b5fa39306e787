"""Lower reshards of buffers' new values into broadcasts from the first rank.

    fwd %mean_root: f32[8]<R> = reshard(%mean)                     where %mean: f32[8]<P(root)>
->
    fwd %mean_root_start: future f32[8]<R> = broadcast_start(%mean)
    fwd %mean_root: f32[8]<R> = wait(%mean_root_start)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zgraph.ir import Graph, Node, Replicate
from zgraph.passes.analysis.lowering import lower, reduces
from zgraph.passes.core.base import Context, Pass


@dataclass(frozen=True)
class Broadcast(Pass):
    """Lower reshards of buffers' new values into broadcasts from the first rank."""

    name: ClassVar[str] = "broadcast"
    requires: ClassVar[frozenset[str]] = frozenset({"placed"})
    provides: ClassVar[frozenset[str]] = frozenset({"lowered"})

    def run(self, graph: Graph, context: Context) -> Graph:
        def wanted(node: Node) -> bool:
            return reduces(node, Replicate(), "root")

        return lower(graph, wanted, "broadcast_start", self.name)
