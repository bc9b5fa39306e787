"""Lower reshards between the memory of the device and that of its host into copies.

    fwd %h_host: f32[8, 64]<V>@host = reshard(%h)
->
    fwd %h_host_start: future f32[8, 64]<V>@host = offload_start(%h)
    fwd %h_host: f32[8, 64]<V>@host = wait(%h_host_start)

Shards on the host that are gathered need no separate copy: the all-gather takes them from there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zgraph.ir import Graph, Node
from zgraph.passes.analysis.lowering import lower, placement_change
from zgraph.passes.core.base import Context, Pass


@dataclass(frozen=True)
class HostCopies(Pass):
    """Lower reshards between the memory of the device and that of its host into copies."""

    name: ClassVar[str] = "host-copies"
    provides: ClassVar[frozenset[str]] = frozenset({"lowered"})

    def run(self, graph: Graph, context: Context) -> Graph:
        def to_host(node: Node) -> bool:
            return placement_change(node) is None and _changes_space(node) and node.results[0].tensor.is_on_host

        def to_device(node: Node) -> bool:
            return placement_change(node) is None and _changes_space(node) and not node.results[0].tensor.is_on_host

        graph = lower(graph, to_host, "offload_start", self.name)
        return lower(graph, to_device, "reload_start", self.name)


def _changes_space(node: Node) -> bool:
    return node.operands[0].tensor.space != node.results[0].tensor.space
