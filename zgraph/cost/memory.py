"""Bytes alive over a step, from the plan alone: every value's birth and death is in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from heapq import nlargest
from typing import NamedTuple

from zgraph.cost.workspace import kept_bytes, workspace_bytes
from zgraph.ir import (
    HOST,
    OPS,
    Graph,
    InputKind,
    Instruction,
    Mesh,
    Node,
    OutputKind,
    Phase,
    Plan,
    Program,
    TensorType,
    Type,
    Value,
    num_shards,
)
from zgraph.ir.aliases import Aliases
from zgraph.ir.arena import offsets
from zgraph.ir.layout import chunk_numel
from zgraph.ir.ops import is_copied, num_chunks, padded_bytes, transfer
from zgraph.ir.symbols import evaluate

ALLOCATION_BYTES = 64
"""Allocators round up to this."""

_ARENA = "#arena"
"""A name, which no value has, for the arena of the program that runs."""

NUM_SERVED = 2
"""Collectives that the runtime works on at once; those started later wait in line, and take no scratch memory yet."""


@dataclass(frozen=True, slots=True)
class Moment:
    """Bytes alive while one instruction runs, by category; nothing of what is at rest is counted.

    `host_bytes` lie in the host's memory, all others in the device's.
    """

    node: str
    phase: str
    bytes_by_category: Mapping[str, int]
    host_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes_by_category.values())


@dataclass(frozen=True)
class MemoryCurve:
    """Bytes alive over one step, above what is at rest."""

    moments: tuple[Moment, ...]

    @property
    def peak_at(self) -> int:
        """The number of the first moment with the most bytes alive; -1 if there is none."""
        return max(range(len(self.moments)), key=lambda i: self.moments[i].total_bytes, default=-1)

    @property
    def peak(self) -> Moment:
        """The first moment with the most bytes alive."""
        return self.moments[self.peak_at] if self.moments else Moment("", "", {})

    @property
    def host_peak_bytes(self) -> int:
        """The most bytes alive at once in the host's memory."""
        return max((m.host_bytes for m in self.moments), default=0)


def simulate_memory(plan: Plan, hints: Mapping[str, int]) -> MemoryCurve:
    """Walk the forward and the backward of a plan with its births and deaths.

    Outputs of the forward are taken to be dropped by the caller before the backward, unless the backward needs them, or
    they are losses that keep more than a number; the inputs of the call are the caller's and not counted. Tangents are,
    unless they are likely to be zero.

    Args:
        plan: the plan.
        hints: a number for each symbolic size.
    """
    return MemoryCurve(tuple(_walked(plan, hints).moments))


def requests(plan: Plan, hints: Mapping[str, int]) -> tuple[list[tuple[str, int]], list[str]]:
    """Requests of a step to a device's allocator, in order: a name and bytes, or the name again and 0 as it gives them
    back; and names of what it leaves there, its gradients."""
    walk = _walked(plan, hints)
    return walk.requests, [name for name, (category, size, _) in walk.alive.items() if size and category != HOST]


class Life(NamedTuple):
    """A storage, alive from the moment `born` until before the moment `freed`; named after the value that it began as.

    What a collective in flight holds has the name of its start with # behind it, a program's arena is #arena.
    """

    name: str
    category: str
    num_bytes: int
    born: int
    freed: int


def lifetimes(plan: Plan, hints: Mapping[str, int]) -> list[Life]:
    """Every storage of a step, as `simulate_memory` counts them. Scratch memory of ops is not among them."""
    walk = _walked(plan, hints)
    for name in list(walk.alive):
        walk.free(name)
    return [life for life in walk.lives if life.num_bytes]


def alive_at_peak(plan: Plan, hints: Mapping[str, int], curve: MemoryCurve) -> list[Life]:
    """Values that are alive on the device at the peak of a plan's curve, largest first."""
    peak = curve.peak_at
    found = [s for s in lifetimes(plan, hints) if s.born <= peak < s.freed and s.category != HOST]
    return sorted(found, key=lambda s: (-s.num_bytes, s.name))


def _walked(plan: Plan, hints: Mapping[str, int]) -> _Walk:
    walk = _Walk(plan, hints)
    walk.run_in_arena(plan.forward)
    saved = {v.name for v in plan.saved} | (walk.keeping if plan.backward is not None else set())
    walk.drop(v.name for v in plan.forward.results if v is not None and v.name not in saved)
    if plan.backward is not None:
        tangents = [i.value for i in plan.graph.inputs if i.kind is InputKind.tangent]
        walk.adopt(t for t in tangents if t.name not in plan.zero_tangents)
        backward = plan.loss_only[0] if plan.loss_only else plan.backward
        walk.drop(backward.unread)
        walk.run_in_arena(backward)
    return walk


class _Walk:
    """Storages alive, as references from live names to the storages that they lie in."""

    def __init__(self, plan: Plan, hints: Mapping[str, int]) -> None:
        self.graph: Graph = plan.graph
        self.hints = hints
        self.categories = _categories(plan)
        self.aliases = Aliases(plan.graph)
        self.held: dict[str, frozenset[str]] = {}
        self.keeping: set[str] = set()
        self.references: Counter[str] = Counter()
        self.alive: dict[str, tuple[str, int, int]] = {}
        self.lives: list[Life] = []
        self.by_category: Counter[str] = Counter()
        self.scratch: dict[str, int] = {}
        self.moments: list[Moment] = []
        self.requests: list[tuple[str, int]] = []

    def run_in_arena(self, program: Program) -> None:
        """A program, with its arena from the beginning to the end."""
        self.hold(_ARENA, "gathered", _rounded(program.arena_bytes))
        self.run(program.instructions)
        self.free(_ARENA)

    def run(self, instructions: Iterable[Instruction]) -> None:
        for instruction in instructions:
            node = instruction.node
            is_new = not self.aliases.add(node) and not offsets(node)
            for result in node.results:
                if is_new:
                    self.allocate(result.name, result.type, num_chunks(node, self.graph.mesh))
                self.refer(result.name, self.aliases.roots(result.name))
            if (kept := kept_bytes(node, self.hints)) and is_new:
                self.keep(node, kept)
            if node.op in OPS and OPS[node.op].lane != "compute":
                self.start(node)
            if node.op == "wait":
                self.finish(_in_flight(node.operands[0].name))
                if self.scratch.pop(node.operands[0].name, 0):
                    self.requests.append((f"{node.operands[0].name}: scratch", 0))
            self.moments.append(self.moment(node))
            self.drop(instruction.frees)

    def keep(self, node: Node, num_bytes: int) -> None:
        """The first result of a node keeps as many bytes more, as long as it lives."""
        name = f"{node.name}+"
        self.hold(name, self.categories.get(node.name, "temporaries"), num_bytes)
        self.references[name] += 1
        self.held[node.name] |= {name}
        self.keeping.add(node.name)

    def start(self, node: Node) -> None:
        """Until its wait, a collective holds what it sends, in place or as a copy, and its scratch memory."""
        graph, moves = self.graph, transfer(node)
        assert moves is not None
        if taken := _rounded(OPS[node.op].scratch_bytes(node, graph.mesh)):
            self.scratch[node.name] = taken
            self.requests.append((f"{node.name}: scratch", taken))
        for value, result in zip(node.operands, node.results, strict=True) if not moves.exchanges else ():
            name = _in_flight(result.name)
            if is_copied(node, value, graph.mesh):
                self.hold(name, "buckets", _rounded(padded_bytes(value.tensor, graph.num_shards)))
            elif moves.holds:
                self.refer(name, self.aliases.roots(value.name))

    def finish(self, start: str) -> None:
        """A collective that is over lets go of what it sent."""
        self.drop((start,))
        self.free(start)

    def moment(self, node: Node) -> Moment:
        """Bytes alive now, by category. Two collectives have scratch memory at a time; the largest two are counted."""
        by_category = dict(self.by_category)
        if self.scratch:
            by_category["buckets"] = by_category.get("buckets", 0) + sum(nlargest(NUM_SERVED, self.scratch.values()))
        if taken := workspace_bytes(node, self.hints):
            by_category["temporaries"] = by_category.get("temporaries", 0) + taken
            self.requests += [(node.op, taken), (node.op, 0)]
        host_bytes = by_category.pop(HOST, 0)
        return Moment(node.name, node.phase.value, by_category, host_bytes)

    def adopt(self, values: Iterable[Value]) -> None:
        """Values that come from outside and live until the plan frees them."""
        for value in values:
            self.allocate(value.name, value.type)
            self.refer(value.name, frozenset((value.name,)))

    def allocate(self, name: str, kind: Type, num_chunks: int = 0) -> None:
        """A value is born; with room for chunks of one size, if there are any."""
        if num_chunks and isinstance(kind, TensorType) and not kind.is_sharded:
            size = _rounded(padded_bytes(kind, num_chunks))
        else:
            size = local_bytes(kind, self.graph.mesh, self.hints)
        if isinstance(kind, TensorType) and kind.is_on_host:
            self.categories[name] = HOST
        self.hold(name, self.categories.get(name, "temporaries"), size)

    def hold(self, name: str, category: str, size: int) -> None:
        self.alive[name] = category, size, len(self.moments)
        self.by_category[category] += size
        if size and category != HOST:
            self.requests.append((name, size))

    def refer(self, name: str, roots: frozenset[str]) -> None:
        """A live name holds these storages until it is dropped."""
        self.held[name] = roots
        self.references.update(roots)

    def drop(self, names: Iterable[str]) -> None:
        for name in names:
            for root in self.held.pop(name, ()):
                self.references[root] -= 1
                if self.references[root] == 0:
                    self.free(root)

    def free(self, root: str) -> None:
        if root in self.alive:
            category, size, born = self.alive.pop(root)
            self.by_category[category] -= size
            self.lives.append(Life(root, category, size, born, len(self.moments)))
            if size and category != HOST:
                self.requests.append((root, 0))


def local_bytes(kind: Type, mesh: Mesh, hints: Mapping[str, int]) -> int:
    """Bytes of one rank's part of a value, rounded up as allocators do."""
    if not isinstance(kind, TensorType):
        return 0
    if kind.is_sharded:
        numel = chunk_numel(kind.shape, num_shards(mesh))
    elif kind.strides is not None:
        sizes = [evaluate(d, hints) for d in kind.shape]
        strides = [evaluate(d, hints) for d in kind.strides]
        numel = 1 + sum((s - 1) * st for s, st in zip(sizes, strides, strict=True)) if all(sizes) else 0
    else:
        numel = evaluate(kind.numel, hints)
    return _rounded(numel * kind.dtype.itemsize)


def _rounded(num_bytes: int) -> int:
    return -(-num_bytes // ALLOCATION_BYTES) * ALLOCATION_BYTES


def _in_flight(start: str) -> str:
    """A name, which no value has, for what the collective of that name holds."""
    return f"{start}#"


def _category(node: Node, kind: Type, inputs: Container[str]) -> str:
    """Category of a value that one of zgraph's own ops makes; empty where the op does not tell it."""
    moves, is_sharded = transfer(node), isinstance(kind, TensorType) and kind.is_sharded
    if moves is None:
        if node.op == "unpack":
            return "gradients" if is_sharded else "gathered"
        return "" if node.op in ("amax", "cast", "float8_cast", "float8_scale", "wait") else "buckets"
    if moves.exchanges:
        return ""
    if moves.reduces:
        return "buckets" if node.operands[0].tensor.reduction == "root" else "gradients"
    if not moves.brings:
        return "buckets"
    if OPS[node.op].lane == "comm" or node.operands[0].name in inputs:
        return "gathered"
    return "activations"


def _categories(plan: Plan) -> dict[str, str]:
    """Categories of the values that are born in the step, by the value's name."""
    found: dict[str, str] = {}
    inputs = plan.graph.param_names
    for node in plan.graph.nodes:
        for result in node.results:
            if node.op in OPS and (category := _category(node, result.type, inputs)):
                found[result.name] = category
    for value in plan.saved:
        found.setdefault(value.name, "activations")
    for output in plan.graph.outputs:
        if output.kind is OutputKind.grad and output.value is not None and output.target in inputs:
            if output.phase is not Phase.forward:
                found[output.value.name] = "gradients"
    return found
