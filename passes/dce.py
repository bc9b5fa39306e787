"""Drop nodes that nothing needs and that have no effect.

A gather for such a node alone is dropped with its release. A value that such a node was the last to read is released
after the last read that is left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from zgraph.ir import Graph, Node
from zgraph.ir.aliases import Memory
from zgraph.ir.arena import sized
from zgraph.ir.ops import is_pure
from zgraph.passes.core.base import Context, Pass
from zgraph.passes.release import last_reads


@dataclass(frozen=True)
class DeadCode(Pass):
    """Drop nodes that nothing needs and that have no effect."""

    name: ClassVar[str] = "dce"

    def run(self, graph: Graph, context: Context) -> Graph:
        released = [n for n in graph.nodes if n.op == "release"]
        used = graph.with_nodes([n for n in graph.nodes if n.op != "release"]) if released else graph
        swept = sweep(used, lambda node: is_pure(graph, node))
        if len(swept.nodes) == len(used.nodes):
            return sized(graph.with_used_ops())
        return sized(_released(graph, used, swept) if released else swept)


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


def _released(graph: Graph, used: Graph, swept: Graph) -> Graph:
    """A swept graph with its releases: each where it was, unless what read the memory last is gone.

    Args:
        graph: with releases.
        used: the same without them.
        swept: what is left of that.
    """
    before, after = (_last_readers(g) for g in (used, swept))
    early: dict[int, list[Node]] = {}
    there: set[int] = set(map(id, swept.nodes))
    for node in graph.nodes:
        if node.op == "release" and (last := after.get(name := node.operands[0].name)) is not None:
            if last is before[name]:
                there.add(id(node))
            else:
                early.setdefault(id(last), []).append(replace(node, phase=last.phase))
    nodes = [m for n in graph.nodes if id(n) in there for m in (n, *early.get(id(n), ()))]
    return graph.with_nodes(nodes).with_used_ops()


def _last_readers(graph: Graph) -> dict[str, Node]:
    """The last node that reads the memory of each value that a node makes."""
    memory = Memory(graph)
    last = last_reads(graph, memory)
    results = (r.name for n in graph.nodes for r in n.results)
    return {name: graph.nodes[max(last[root] for root in memory.roots(name))] for name in results}
