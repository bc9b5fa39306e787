"""Which values share memory, and where memory is last used.

A storage is named after the value that made it, its root.
"""

from __future__ import annotations

from collections.abc import Mapping

from zgraph.ir.graph import Graph, Node
from zgraph.ir.ops import views


class Aliases:
    """The storages that values are in, for those who follow a graph node by node."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._shared: dict[str, frozenset[str]] = {}

    def add(self, node: Node) -> bool:
        """Take note of what the results of a node share, and say whether they do. Nodes come in the order in which they
        run.
        """
        if sources := views(self._graph, node):
            shared = self.roots(*sources)
            self._shared.update((result.name, shared) for result in node.results)
        return bool(sources)

    def roots(self, *names: str) -> frozenset[str]:
        """The storages that the values of these names may be in; a value that shares none is in its own."""
        if len(names) == 1:
            return self._shared.get(names[0]) or frozenset(names)
        return frozenset().union(*(self._shared.get(name) or (name,) for name in names))


class Memory(Aliases):
    """The storages of a whole graph."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        for node in graph.nodes:
            self.add(node)

    def last_uses(self) -> Mapping[str, int]:
        """For each storage, the position of the last node that touches it (absent if none does)."""
        last: dict[str, int] = {}
        for position, node in enumerate(self._graph.nodes):
            for value in (*node.operands, *node.results):
                for root in self.roots(value.name):
                    last[root] = position
        return last

    def returned(self) -> frozenset[str]:
        """The storages that outputs of the graph are in."""
        return self.roots(*self._graph.output_names)
