"""Compute values of the forward again in the backward instead of keeping them.

    fwd %g = aten.silu.default(%x)                 fwd %g = aten.silu.default(%x)
    fwd %y = aten.mul.Tensor(%g, %u)               fwd %y = aten.mul.Tensor(%g, %u)
    ...                                      ->    ...
    bwd %du = aten.mul.Tensor(%dy, %g)             bwd %g_again = aten.silu.default(%x)
                                                   bwd %du = aten.mul.Tensor(%dy, %g_again)

The values to keep are chosen block by block, at the least time for the bytes (`analysis/forward.py`). Regions that the
user put under `torch.utils.checkpoint` are always computed again. The pass `fit` does this for a memory budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zgraph.ir import Graph, Phase
from zgraph.passes.analysis.forward import Forward
from zgraph.passes.core.base import Context, Pass


@dataclass(frozen=True)
class Recompute(Pass):
    """Compute values of the forward again in the backward instead of keeping them.

    Args:
        keep_bytes: what the backward needs of the forward may take this much. 0 computes again only what the user
            marked.
    """

    keep_bytes: int = 0

    name: ClassVar[str] = "recompute"
    requires: ClassVar[frozenset[str]] = frozenset({"placed"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"lowered"})

    def __post_init__(self) -> None:
        if self.keep_bytes < 0:
            raise ValueError("keep_bytes must be 0 or more")

    def run(self, graph: Graph, context: Context) -> Graph:
        is_marked = any(n.checkpoint for n in graph.nodes)
        if not graph.phase_nodes(Phase.backward) or not (self.keep_bytes or is_marked):
            return graph
        forward = Forward(graph, context)
        return forward.keeping(forward.choices(self.keep_bytes or None, exactly=self.keep_bytes > 0))
