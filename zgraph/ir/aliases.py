"""Which values share memory, and where memory is last used."""

from __future__ import annotations

from collections.abc import Mapping

from zgraph.ir import Graph
from zgraph.ir.ops import views


class Memory:
    """The storages of a graph. Each is named after the value that made it, its *root*."""

    def __init__(self, graph: Graph) -> None:
        self._roots: dict[str, frozenset[str]] = {}
        for node in graph.nodes:
            if sources := views(graph, node):
                shared = frozenset(root for name in sources for root in self.roots(name))
                self._roots.update((result.name, shared) for result in node.results)
        self._graph = graph

    def roots(self, name: str) -> frozenset[str]:
        """The storages that the value called `name` may be in."""
        return self._roots.get(name) or frozenset((name,))

    def last_uses(self) -> Mapping[str, int]:
        """For each storage, the position of the last node that touches it (absent if none does)."""
        last: dict[str, int] = {}
        for position, node in enumerate(self._graph.nodes):
            for value in (*node.operands, *node.results):
                for root in self.roots(value.name):
                    last[root] = position
        return last

    def returned(self) -> frozenset[str]:
        """The storages that outputs of the graph lie in."""
        return frozenset(root for name in self._graph.output_names for root in self.roots(name))
