"""Release memory that was gathered, or brought back from the host, after its last use.

fwd %w_full: f32[64, 32]<R> = wait(%w_full_start)
fwd %wt: f32[32, 64]<R> = aten.t.default(%w_full)
fwd %y: f32[4, 32]<V> = aten.mm.default(%x, %wt)
fwd release(%w_full)                                    <- put here, after the last use of the memory
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zgraph.ir import OPS, Builder, Graph, Node, Value
from zgraph.ir.aliases import Memory
from zgraph.ir.ops import brings
from zgraph.passes.core.base import Context, Pass


@dataclass(frozen=True)
class Release(Pass):
    """Release memory that was gathered, or brought back from the host, after its last use."""

    name: ClassVar[str] = "release"
    requires: ClassVar[frozenset[str]] = frozenset({"gathered"})
    provides: ClassVar[frozenset[str]] = frozenset({"released"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"released"})

    def run(self, graph: Graph, context: Context) -> Graph:
        builder = Builder(graph, self.name)
        memory = Memory(graph)
        last, returned = last_reads(graph, memory), memory.returned()
        after: dict[int, list[Value]] = {}
        for value in gathered_values(graph):
            roots = memory.roots(value.name)
            if not roots & returned:
                after.setdefault(max(last[r] for r in roots), []).append(value)
        nodes: list[Node] = []
        for position, node in enumerate(graph.nodes):
            nodes.append(node)
            for value in after.get(position, ()):
                nodes.append(builder.node("release", (value,), "", node.phase, node.origin))
        return graph.with_nodes(nodes)


def last_reads(graph: Graph, memory: Memory) -> dict[str, int]:
    """The position of the last node that reads each storage; what is sent is read until it is waited for."""
    last = dict(memory.last_uses())
    for sends in graph.nodes:
        if sends.op in OPS and OPS[sends.op].lane != "compute":
            over = max((p for r in sends.results for p in graph.users.get(r.name, ())), default=-1)
            sent = [root for v in sends.operands for root in memory.roots(v.name)]
            last.update((root, max(last[root], over)) for root in sent)
    return last


def gathered_values(graph: Graph) -> list[Value]:
    """The values that all-gathers and reloads delivered, and those unpacked from them: one a piece of memory."""
    found: list[Value] = []
    flats: set[str] = set()
    for node in graph.nodes:
        if node.op == "wait":
            start = graph.producers.get(node.operands[0].name)
            if start is not None and brings(start):
                found.append(node.results[0])
                flats.add(node.name)
        elif node.op == "unpack" and node.operands[0].name in flats:
            found.extend(node.results)
    return found
