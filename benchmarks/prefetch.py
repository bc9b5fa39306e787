"""FSDP2's schedule as a pass, to compare with: start gathers ahead of their use, and wait for reductions late.

fwd %a = wait(%a_start)                        fwd %b_start = all_gather_start(%b_shard)
fwd %y = aten.mm.default(%x, %a)         ->    fwd %a = wait(%a_start)
fwd %b_start = all_gather_start(%b_shard)      fwd %y = aten.mm.default(%x, %a)
fwd %b = wait(%b_start)                        fwd %b = wait(%b_start)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zgraph.ir import OPS, Graph, Node
from zgraph.ir.ops import brings, transfer
from zgraph.passes import Context, Pass, register_pass
from zgraph.passes.analysis.order import reorder


@register_pass
@dataclass(frozen=True)
class Prefetch(Pass):
    """FSDP2's schedule as a pass, to compare with: start gathers ahead of their use, and wait for reductions late.

    Args:
        depth: how many collectives of a kind may be under way beside the one waited for. 0 changes nothing.
    """

    depth: int = 1

    name: ClassVar[str] = "prefetch"
    requires: ClassVar[frozenset[str]] = frozenset({"lowered"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"laid out"})

    def __post_init__(self) -> None:
        if self.depth < 0:
            raise ValueError(f"depth must be 0 or more, not {self.depth}")

    def run(self, graph: Graph, context: Context) -> Graph:
        if self.depth == 0:
            return graph
        priority = {**self._gathers(graph), **self._reductions(graph)}
        return reorder(graph, lambda position, _: priority.get(position, position))

    def _gathers(self, graph: Graph) -> dict[int, float]:
        """A gather starts, with what it needs, just before the wait of the gather `depth` before it (or the first)."""
        moved: dict[int, float] = {}
        position_of = {n.name: p for p, n in enumerate(graph.nodes) if n.results}
        waits: list[tuple[object, int]] = []
        for position, node in enumerate(graph.nodes):
            if not brings(node) or OPS[node.op].lane != "comm":
                continue
            ahead = [at for phase, at in waits if phase is node.phase]
            if ahead:
                moved.update(
                    (p, ahead[-self.depth :][0] - 0.5) for p in (*_feeders(graph, node, position_of), position)
                )
            waits.append((node.phase, graph.users[node.name][0]))
        return moved

    def _reductions(self, graph: Graph) -> dict[int, float]:
        """The wait of a reduction, with what follows from it, comes just after the start `depth` behind it.

        An all-reduce or broadcast holds nothing but its result, which stays in any case: its wait comes last of all.
        """
        moved: dict[int, float] = {}
        end = float(len(graph.nodes))
        reductions = {p: m for p, n in enumerate(graph.nodes) if (m := transfer(n)) is not None and m.reduces}
        starts = [*reductions]
        for index, start in enumerate(starts):
            behind = index + self.depth
            in_place = not reductions[start].holds
            until = end if in_place or behind >= len(starts) else starts[behind] + 0.5
            for position in _followers(graph, start):
                moved[position] = until
        return moved


def _feeders(graph: Graph, node: Node, position_of: dict[str, int]) -> list[int]:
    """Positions of the casts and packs that only prepare this gather."""
    found: list[int] = []
    todo = [node]
    while todo:
        for value in todo.pop().operands:
            maker = graph.producers.get(value.name)
            if maker is not None and maker.op in OPS and OPS[maker.op].prepares:
                found.append(position_of[maker.name])
                todo.append(maker)
    return found


def _followers(graph: Graph, start: int) -> list[int]:
    """Positions of the wait of a reduction and of the unpack and casts behind it."""
    found: list[int] = []
    todo = [start]
    while todo:
        for result in graph.nodes[todo.pop()].results:
            for user in graph.users.get(result.name, ()):
                if graph.nodes[user].op in ("wait", "unpack", "cast"):
                    found.append(user)
                    todo.append(user)
    return found
