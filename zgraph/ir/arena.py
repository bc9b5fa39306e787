"""Buffers that a program makes at fixed places in one block of memory, its arena: nothing fragments.

A node's option `at` has one offset in bytes for each of its results. The forward and the backward have an arena each,
and the graph says how large (`Graph.arenas`): that much the runtime takes, and the memory simulation counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from zgraph.ir.aliases import Aliases
from zgraph.ir.graph import PROGRAMS, Graph, Node, Phase
from zgraph.ir.ops import OPS, padded_bytes
from zgraph.ir.types import TensorType, num_shards

ALIGN_BYTES = 512
"""Every buffer starts at a multiple of this, and an arena's size is one, as with blocks of allocators: kernels that
read 16 bytes at once, and collectives that want whole lines, find what lies in an arena where they found it outside.
"""


@dataclass(frozen=True, slots=True)
class Buffer:
    """A result of a node that can be in an arena.

    Args:
        name: of the value.
        node: the position of the node that makes it.
        num_bytes: rounded up to ALIGN_BYTES.
        last: the position of the last node that it must be there for.
        offset: its place in bytes; None where it is allocated separately.
    """

    name: str
    node: int
    num_bytes: int
    last: int
    offset: int | None = None

    def overlaps(self, other: Buffer) -> bool:
        """Whether both are alive at some time."""
        return self.node <= other.last and other.node <= self.last


def runs_in(node: Node, program: Phase) -> bool:
    """Whether a node is part of a program: the forward, or the backward with all that follows it."""
    return (node.phase is Phase.forward) == (program is Phase.forward)


def buffers(graph: Graph, program: Phase) -> list[Buffer]:
    """Buffers that could lie in a program's arena: gathered parameters and buckets that die in the program that makes
    them.

    Args:
        graph: lowered and in its final order.
        program: forward, or backward for all that follows it.
    """
    found: dict[str, Buffer] = {}
    aliases = Aliases(graph)
    sending: dict[str, frozenset[str]] = {}
    escaped: set[str] = set()
    ends: dict[str, int] = {}
    for position, node in enumerate(graph.nodes):
        is_here = runs_in(node, program)
        aliases.add(node)
        for value in node.operands:
            touched = aliases.roots(value.name) | sending.get(value.name, frozenset())
            ends.update((root, position) for root in touched)
            if not is_here:
                escaped |= touched
        if is_here:
            at = offsets(node)
            for index, result in enumerate(node.results):
                if _can_lie_there(graph, node, result.type):
                    num_bytes, offset = _num_bytes(graph, result.type), at[index] if at else None
                    found[result.name] = Buffer(result.name, position, num_bytes, position, offset)
        if node.op in OPS and OPS[node.op].lane != "compute":  # what is sent must stay until the wait
            sent = aliases.roots(*(value.name for value in node.operands))
            sending.update((result.name, sent) for result in node.results)
    escaped |= aliases.roots(*graph.output_names)
    return [replace(b, last=max(b.node, ends.get(b.name, 0))) for b in found.values() if b.name not in escaped]


def offsets(node: Node) -> tuple[int, ...]:
    """Where the results of a node lie in the arena; nothing where they do not."""
    at = node.option("at")
    return tuple(o for o in at if type(o) is int) if isinstance(at, tuple) else ()


def sizes(graph: Graph) -> Mapping[Phase, int]:
    """The bytes that each program's arena needs: up to where the last buffer in it ends."""
    ends: dict[Phase, int] = {}
    for node in graph.nodes:
        program = next(p for p in PROGRAMS if runs_in(node, p))
        for offset, result in zip(offsets(node), node.results, strict=False):
            if _can_lie_there(graph, node, result.type):
                ends[program] = max(ends.get(program, 0), _rounded(offset + _num_bytes(graph, result.type)))
    return ends


def sized(graph: Graph) -> Graph:
    """The graph with its arenas as large as they need to be."""
    return graph if (found := sizes(graph)) == graph.arenas else replace(graph, arenas=found)


def clashes(found: Iterable[Buffer]) -> Iterator[tuple[Buffer, Buffer]]:
    """Pairs of buffers that are alive at one time and lie in the same memory."""
    alive: list[Buffer] = []
    for buffer in sorted((b for b in found if b.offset is not None), key=lambda b: b.node):
        alive = [b for b in alive if b.last >= buffer.node]
        for other in alive:
            assert buffer.offset is not None
            assert other.offset is not None
            if buffer.offset < other.offset + other.num_bytes and other.offset < buffer.offset + buffer.num_bytes:
                yield other, buffer
        alive.append(buffer)


def _can_lie_there(graph: Graph, node: Node, kind: object) -> bool:
    if not isinstance(kind, TensorType) or kind.is_sharded or kind.is_on_host or kind.strides is not None:
        return False
    row = OPS.get(node.op)
    if row is None or not row.lies_in_arena or node.option("keep"):
        return False
    return row.lane != "h2d" or node.operands[0].name in graph.param_names


def _num_bytes(graph: Graph, kind: object) -> int:
    """Bytes that a buffer takes in an arena, padded and rounded up."""
    assert isinstance(kind, TensorType)
    return _rounded(padded_bytes(kind, num_shards(graph.mesh)))


def _rounded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGN_BYTES) * ALIGN_BYTES
