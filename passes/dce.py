"""Drop nodes that nothing needs and that have no effect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from zgraph.ir import Graph, Node
from zgraph.ir.arena import sized
from zgraph.ir.ops import is_pure
from zgraph.passes.base import Context, Pass


@dataclass(frozen=True)
class DeadCode(Pass):
    """Drop nodes that nothing needs and that have no effect."""

    name: ClassVar[str] = "dce"

    def run(self, graph: Graph, context: Context) -> Graph:
        return sized(sweep(graph, lambda node: is_pure(graph, node)))


def sweep(graph: Graph, removable: Callable[[Node], bool]) -> Graph:
    """The graph without the removable nodes whose results nothing reads, and without ops that it then never uses."""
    needed = set(graph.output_names)
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        if removable(node) and not any(r.name in needed for r in node.results):
            continue
        needed.update(v.name for v in node.operands)
        kept.append(node)
    return graph.with_nodes(kept[::-1]).with_used_ops()
