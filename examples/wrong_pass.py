"""A pass with a mistake in it, to be found: docs/debug-a-pass.md does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from zgraph.ir import ExternalOp, Graph, Node
from zgraph.passes import Context, Pass


@dataclass(frozen=True)
class Powers(Pass):
    """Write small powers without a power. The first power is right; the square is not.

    bwd %a = aten.pow.Tensor_Scalar(%x, 1.0)   ->   bwd %a = aten.mul.Tensor(%x, 1.0)
    fwd %b = aten.pow.Tensor_Scalar(%x, 2)     ->   fwd %b = aten.add.Tensor(%x, %x)
    """

    name: ClassVar[str] = "powers"

    def run(self, graph: Graph, context: Context) -> Graph:
        nodes = tuple(self.written(node) for node in graph.nodes)
        used = {node.op for node in nodes}
        made = {op: ExternalOp() for op in ("aten.mul.Tensor", "aten.add.Tensor") if op in used}
        kept = {op: row for op, row in graph.foreign.items() if op in used}
        return replace(graph, nodes=nodes, foreign={**made, **kept})

    def written(self, node: Node) -> Node:
        if node.op != "aten.pow.Tensor_Scalar" or node.args[1] not in (1, 2):
            return node
        x = node.args[0]
        if node.args[1] == 1:
            return replace(node, op="aten.mul.Tensor", args=(x, 1.0))
        return replace(node, op="aten.add.Tensor", args=(x, x))  # should be: aten.mul.Tensor
