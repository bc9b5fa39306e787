"""Which values have the strides that their types state, in each call, once they had them in one."""

from __future__ import annotations

from collections.abc import Iterable

from zgraph.ir import Graph
from zgraph.runtime.region import Region


class Strides:
    """Strides follow from those of what is read, so that only what comes from outside may have others.

    Args:
        graph: the graph that the regions are of.
        resident: names of parameters and constants, whose memory stays.
        parts: parts of the programs that run before and now. A region says so when what it reads has other strides.
    """

    def __init__(self, graph: Graph, resident: Iterable[str], parts: Iterable[object]) -> None:
        self.graph = graph
        self._settled = dict.fromkeys(resident, True)
        self._settled |= {v.name: True for part in parts if isinstance(part, Region) for v in part.outputs}

    def loose(self, region: Region) -> list[int]:
        """The positions of a region's inputs that may come with other strides in a later call."""
        return [i for i, value in enumerate(region.inputs) if not self._is_settled(value.name)]

    def _is_settled(self, name: str) -> bool:
        todo = [name]
        while todo:
            at = todo[-1]
            node = self.graph.producers.get(at)
            if at in self._settled:
                todo.pop()
            elif node is None or ((row := self.graph.foreign.get(node.op)) is not None and row.opaque):
                self._settled[todo.pop()] = False
            elif waiting := [v.name for v in node.operands if v.name not in self._settled]:
                todo += waiting
            else:
                self._settled[todo.pop()] = all(self._settled[v.name] for v in node.operands)
        return self._settled[name]
