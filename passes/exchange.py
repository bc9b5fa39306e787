"""Lower reshards along model axes: to collectives of the ranks of the axis, or to what each rank does alone.

    fwd %y_R: f32[4, 32]<R, V> = reshard(%y)                       where %y: f32[4, 32]<P(sum), V>
->
    fwd %y_R_start: future f32[4, 32]<R, V> = all_reduce_start(%y, axis="tensor")
    fwd %y_R: f32[4, 32]<R, V> = wait(%y_R_start)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from zgraph.ir import Arg, Builder, Graph, Node, Shard
from zgraph.ir.axis_rules import changed_axis, collective
from zgraph.passes.core.base import Context, Numerics, Pass


@dataclass(frozen=True)
class Exchange(Pass):
    """Lower reshards along model axes: to collectives of the ranks of the axis, or to what each rank does alone."""

    name: ClassVar[str] = "exchange"
    numerics: ClassVar[Numerics] = Numerics.reassociates
    requires: ClassVar[frozenset[str]] = frozenset({"placed"})
    provides: ClassVar[frozenset[str]] = frozenset({"lowered"})

    def run(self, graph: Graph, context: Context) -> Graph:
        if all(self.axis(graph, node) is None for node in graph.nodes):
            return graph
        builder = Builder(graph, self.name)
        nodes: list[Node] = []
        for node in graph.nodes:
            index = self.axis(graph, node)
            nodes += [node] if index is None else _lowered(node, index, graph.mesh[index].name, builder)
        return graph.with_nodes(nodes)

    @staticmethod
    def axis(graph: Graph, node: Node) -> int | None:
        """The number of the model axis that a reshard is along; None of all other nodes."""
        if node.op != "reshard":
            return None
        return changed_axis(node.operands[0].tensor, node.results[0].tensor, graph.mesh)


def _lowered(node: Node, index: int, axis: str, builder: Builder) -> Iterator[Node]:
    old, new = node.operands[0].tensor.placement[index], node.results[0].tensor.placement[index]
    op = collective(old, new)
    options: dict[str, Arg] = {"axis": axis}
    if isinstance(new, Shard):
        options["dim"] = new.dim
        if len(new.blocks) > 1:
            options["blocks"] = new.blocks
    if not op.endswith("_start"):
        yield builder.typed(op, node.args, node.results, node.phase, node.origin, **options)
        return
    future = builder.value(f"{node.name}_start", node.results[0].tensor.promised())
    start = builder.typed(op, node.args, (future,), node.phase, node.origin, **options)
    yield start
    yield builder.typed("wait", start.results, node.results, node.phase, node.origin)
