"""Drop ops that only rename a value.

    fwd %a: f32[4] = aten.mul.Tensor(%x, %y)
    fwd %b: f32[4] = aten.detach.default(%a)            ->      fwd %a: f32[4] = aten.mul.Tensor(%x, %y)
    fwd %c: f32[4] = aten.exp.default(%b)                       fwd %c: f32[4] = aten.exp.default(%a)

A value that the graph returns keeps its own name: a host framework may tell a value from a view of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zgraph.ir import Graph, Node, Value
from zgraph.ir.external_ops import facts
from zgraph.passes.core.base import Context, Pass


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Drop ops that only rename a value."""

    name: ClassVar[str] = "canonicalize"

    def run(self, graph: Graph, context: Context) -> Graph:
        renamed: dict[str, Value] = {}
        kept: list[Node] = []
        for node in graph.nodes:
            node = node.substitute(renamed)
            if facts(node.op).elements == "itself" and node.name not in graph.output_names and _same(node):
                renamed[node.name] = node.operands[0]
            else:
                kept.append(node)
        return graph.with_nodes(kept)


def _same(node: Node) -> bool:
    return len(node.operands) == 1 and node.operands[0].type == node.results[0].type
