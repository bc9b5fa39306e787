"""The peak of the device's memory, recomputed from a graph alone: no code of the plan, of passes or of the simulator.

A storage is alive from the node that makes it to the last that touches it or a view of it, the release among them; what
is sent, until the wait. What waits for the backward is alive in between, gradients to the end, an arena for the whole
program. What an op takes for itself while it runs is read from the same table as the plan's. Not counted is what the
caller holds (the inputs, and outputs once the forward is over), and what is on the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from heapq import nlargest
from itertools import accumulate

from zgraph.cost.workspace import kept_bytes, workspace_bytes
from zgraph.ir import OPS, Graph, InputKind, Node, Phase, TensorType, Type
from zgraph.ir.aliases import Aliases
from zgraph.ir.arena import offsets
from zgraph.ir.layout import chunk_numel
from zgraph.ir.ops import brings, is_copied, num_chunks, padded_bytes, transfer, views
from zgraph.ir.symbols import evaluate
from zgraph.passes.plan.zero_tangents import without_tangents, zero_tangents

ALLOCATION_BYTES = 64
"""Allocators round up to this."""

NUM_SERVED = 2
"""Collectives that have scratch memory at one time: the runtime serves the others later."""

NUM_SHOWN = 5


@dataclass(frozen=True)
class Peak:
    """The most bytes of the device alive at once in a step above what is at rest, the node where that is, its phase,
    and names and bytes of the largest of what is alive there."""

    num_bytes: int = 0
    node: str = ""
    phase: str = ""
    largest: tuple[tuple[str, int], ...] = ()


def peak(graph: Graph, hints: Mapping[str, int], *, released: bool = False) -> Peak:
    """The peak of a lowered graph in the order of its nodes, for a call of which only the loss is differentiated.

    Args:
        graph: a valid graph without reshards.
        hints: a number for each symbolic size, and of threads for a graph of processors.
        released: what is gathered lives until its release; to the end of the step where it has none.
    """
    zeros = zero_tangents(graph)
    loss_only = without_tangents(graph, zeros) if zeros else None
    return _Step(graph, loss_only or graph, hints, released).peak()


class _Step:
    """The storages of a step, each with its bytes and the positions of the first and the last node that need it."""

    def __init__(self, graph: Graph, loss_only: Graph, hints: Mapping[str, int], released: bool) -> None:
        self.graph, self.hints = graph, hints
        forward = graph.phase_nodes(Phase.forward)
        backward = tuple(n for n in loss_only.nodes if n.phase is not Phase.forward)
        self.nodes, begin = (*forward, *backward), len(forward)
        self.lives: dict[str, list[int]] = {}
        self.aliases = Aliases(graph)
        self.held: dict[str, frozenset[str]] = {}
        self.scratch: dict[str, list[int]] = {}
        self.keeping: list[str] = []
        for position, node in enumerate(forward):
            self.run(position, node)
        waiting = [v.name for n in graph.nodes if n.phase is not Phase.forward for v in n.operands]
        self.touch([*waiting, *graph.output_names], begin - 1)
        for entry in loss_only.inputs if backward else ():
            if entry.kind is InputKind.tangent:
                self.make(entry.value.name, local_bytes(entry.value.type, graph, hints), begin, begin - 1)
        for position, node in enumerate(backward, begin):
            self.run(position, node)
        last = len(self.nodes) - 1
        self.touch(graph.output_names.intersection(self.keeping) if backward else (), last)
        self.touch([o.value.name for o in loss_only.outputs if o.value and o.phase is not Phase.forward], last)
        if released:
            self.touch(self.unreleased(), last)
        for phase, nodes, first in ((Phase.forward, forward, 0), (Phase.backward, backward, begin)):
            if any(offsets(node) for node in nodes):
                self.make(f"arena {phase.value}", graph.arenas.get(phase, 0), first, first + len(nodes) - 1)

    def make(self, name: str, num_bytes: int, born: int, last: int) -> None:
        self.lives[name] = [num_bytes, born, last]

    def touch(self, names: Iterable[str], position: int) -> None:
        """Extends the lifetime of the memory behind these names to this position."""
        for root in self.aliases.roots(*names) & self.lives.keys():
            self.lives[root][2] = max(self.lives[root][2], position)

    def run(self, position: int, node: Node) -> None:
        """Records the memory that a node reads and makes, and that a start holds until it is waited for."""
        self.touch((v.name for v in node.operands), position)
        self.aliases.add(node)
        for result in node.results if not views(self.graph, node) else ():
            num_bytes = 0 if offsets(node) else self.room(node, result.type)
            self.make(result.name, num_bytes, position, position)
        if (kept := kept_bytes(node, self.hints)) and node.name in self.lives:
            self.lives[node.name][0] += kept
            self.keeping.append(node.name)
        if node.op == "wait":
            start = node.operands[0].name
            self.touch(self.held.get(start, ()), position - 1)
            if start in self.scratch:
                self.scratch[start][2] = position - 1
        elif node.op in OPS and OPS[node.op].lane != "compute":
            self.start(position, node)

    def start(self, position: int, node: Node) -> None:
        """Records what a collective or a copy needs beside its results: scratch memory, and the operand or its copy."""
        graph, moves = self.graph, transfer(node)
        assert moves is not None
        self.scratch[node.name] = [_rounded(OPS[node.op].scratch_bytes(node, graph.mesh)), position, len(self.nodes)]
        for value, result in zip(node.operands, node.results, strict=True) if not moves.exchanges else ():
            if is_copied(node, value, graph.mesh):
                copied = f"{result.name}, sent"
                self.make(copied, _rounded(padded_bytes(value.tensor, graph.num_shards)), position, position)
                self.held[result.name] = frozenset((copied,))
            elif moves.holds:
                self.held[result.name] = self.aliases.roots(value.name)

    def room(self, node: Node, kind: Type) -> int:
        """Bytes of a result: with room for equal chunks where a collective, or taking a bucket apart, makes it."""
        if isinstance(kind, TensorType) and not (kind.is_sharded or kind.is_on_host):
            if count := num_chunks(node, self.graph.mesh):
                return _rounded(padded_bytes(kind, count))
        return local_bytes(kind, self.graph, self.hints)

    def unreleased(self) -> set[str]:
        """The memory that was gathered or brought back, is not returned, and has no release."""
        made = {r.name for n in self.nodes if brings(n) for r in n.results}
        waits = {n.name for n in self.nodes if n.op == "wait" and self.aliases.roots(n.name) <= made}
        made |= {r.name for n in self.nodes if n.op == "unpack" and n.operands[0].name in waits for r in n.results}
        ends = [v.name for n in self.nodes if n.op == "release" for v in n.operands] + list(self.graph.output_names)
        return made - self.aliases.roots(*ends)

    def peak(self) -> Peak:
        change, busy, totals = [0] * (len(self.nodes) + 2), dict[str, int](), list[int]()
        for num_bytes, born, last in self.lives.values():
            change[born] += num_bytes
            change[last + 1] -= num_bytes
        for position, alive in enumerate(accumulate(change[: len(self.nodes)])):
            node = self.nodes[position]
            if node.name in self.scratch:
                busy[node.name] = self.scratch[node.name][0]
            taken = workspace_bytes(node, self.hints)
            totals.append(alive + sum(nlargest(NUM_SERVED, busy.values())) + taken)
            busy = {name: size for name, size in busy.items() if self.scratch[name][2] > position}
        if not totals:
            return Peak()
        at = max(range(len(totals)), key=totals.__getitem__)
        there = [(name, size) for name, (size, born, last) in self.lives.items() if born <= at <= last and size]
        largest = sorted(there, key=lambda item: (-item[1], item[0]))[:NUM_SHOWN]
        return Peak(totals[at], self.nodes[at].name, self.nodes[at].phase.value, tuple(largest))


def local_bytes(kind: Type, graph: Graph, hints: Mapping[str, int]) -> int:
    """Bytes of this rank's part of a value on the device."""
    if not isinstance(kind, TensorType) or kind.is_on_host:
        return 0
    if kind.is_sharded:
        numel = chunk_numel(kind.shape, graph.num_shards)
    elif kind.strides is None:
        numel = evaluate(kind.numel, hints)
    else:
        sizes = [evaluate(size, hints) for size in kind.shape]
        steps = [evaluate(stride, hints) for stride in kind.strides]
        numel = 1 + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True)) if all(sizes) else 0
    return _rounded(numel * kind.dtype.itemsize)


def _rounded(num_bytes: int) -> int:
    return -(-num_bytes // ALLOCATION_BYTES) * ALLOCATION_BYTES
