"""Give gathered parameters and buckets fixed places in one block of memory, so that nothing fragments.

                                                   arena fwd=12288
    fwd %a = all_gather_start(%s)                  fwd %a = all_gather_start(%s, at=[0])
    fwd %b = all_gather_start(%t)           ->     fwd %b = all_gather_start(%t, at=[4096])
    ...                                            ...
    fwd %c = all_gather_start(%u)                  fwd %c = all_gather_start(%u, at=[0])       %a is dead by now

Large buffers are placed first, each at the lowest place that is free for as long as it lives (Pisarchyk, Lee:
"Efficient memory management for deep neural net inference", 2020, greedy by size). The forward and the backward have an
arena each, as large as their most crowded moment wants, and the graph says how large. It is there for the whole
program, which may raise the peak: then, if there is no room for that, buffers are allocated separately.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from zgraph.ir import Graph, Node, Phase
from zgraph.ir.arena import Buffer, buffers, sized
from zgraph.ir.graph import PROGRAMS
from zgraph.passes.core.base import Context, Pass
from zgraph.passes.plan.make_plan import memory_of


@dataclass(frozen=True)
class Arena(Pass):
    """Give gathered parameters and buckets fixed places in one block of memory, so that nothing fragments.

    Args:
        always: also where the device's allocator keeps no blocks, and nothing fragments. A memory budget still goes
            first.
    """

    always: bool = False

    name: ClassVar[str] = "arena"
    requires: ClassVar[frozenset[str]] = frozenset({"lowered"})
    provides: ClassVar[frozenset[str]] = frozenset({"laid out"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"laid out"})

    def run(self, graph: Graph, context: Context) -> Graph:
        if not (self.always or context.keeps_blocks):
            return graph
        offsets = {buffer.name: buffer.offset for program in PROGRAMS for buffer in place(buffers(graph, program))}
        placed = sized(graph.with_nodes([_at(node, offsets) for node in graph.nodes]))
        if not offsets or context.step_bytes is None:
            return placed
        peak = memory_of(placed, context.hints).peak
        return placed if peak.total_bytes <= context.step_bytes else graph


def place(found: Sequence[Buffer]) -> list[Buffer]:
    """The buffers with an offset each, those that are alive at one time apart."""
    placed: list[tuple[int, Buffer]] = []
    for buffer in sorted(found, key=lambda b: (-b.num_bytes, b.node)):
        offset = 0
        for begin, num_bytes in sorted((at, other.num_bytes) for at, other in placed if other.overlaps(buffer)):
            if offset + buffer.num_bytes <= begin:
                break
            offset = max(offset, begin + num_bytes)
        placed.append((offset, buffer))
    return [replace(buffer, offset=offset) for offset, buffer in placed]


def crowded_bytes(found: Sequence[Buffer]) -> int:
    """The most bytes alive at once: no arena can be smaller."""
    births = [(b.node, b.num_bytes) for b in found]
    deaths = [(b.last + 1, -b.num_bytes) for b in found]
    alive = most = 0
    for _, num_bytes in sorted(births + deaths):
        alive += num_bytes
        most = max(most, alive)
    return most


@dataclass(frozen=True)
class ArenaSize:
    """The arena of one program, beside the bytes below which none can go."""

    num_bytes: int
    crowded_bytes: int


def sizes(graph: Graph) -> dict[Phase, ArenaSize]:
    """The arenas of a graph; nothing for a program without one."""
    found = {}
    for program, num_bytes in graph.arenas.items():
        placed = [b for b in buffers(graph, program) if b.offset is not None]
        found[program] = ArenaSize(num_bytes, crowded_bytes(placed))
    return found


def _at(node: Node, offsets: dict[str, int | None]) -> Node:
    """The node with the places of its results, if all of them have one."""
    at = tuple(offsets.get(result.name) for result in node.results)
    return replace(node, kwargs=(*node.kwargs, ("at", at))) if at and None not in at else node
