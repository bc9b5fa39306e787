"""Bytes alive over a step, from the plan alone: every value's birth and death is in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import nlargest

from zgraph.cost.workspace import workspace_bytes
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
    TensorType,
    Type,
    Value,
    num_shards,
)
from zgraph.ir.arena import arena_bytes, offsets
from zgraph.ir.layout import chunk_numel
from zgraph.ir.ops import is_copied, padded_bytes, views
from zgraph.ir.symbols import evaluate

_SENDS_IN_PLACE = ("all_gather_start", "reduce_scatter_start", "offload_start", "reload_start")
"""Starts that read their operand until they are waited for. The others copy it first."""

ALLOCATION_BYTES = 64
"""Allocators round up to this."""

_ARENA = "#arena"
"""A name, which no value has, for the arena of the program that runs."""

NUM_SERVED = 2
"""Collectives that the runtime works on at once; those started later wait in line, and take no scratch memory yet."""


@dataclass(frozen=True, slots=True)
class Moment:
    """Bytes alive while one instruction runs, by category; nothing of what lies at rest is counted.

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
    """Bytes alive over one step, above what lies at rest."""

    moments: tuple[Moment, ...]

    @property
    def peak(self) -> Moment:
        """The first moment with the most bytes alive."""
        return max(self.moments, key=lambda m: m.total_bytes, default=Moment("", "", {}))

    @property
    def host_peak_bytes(self) -> int:
        """The most bytes alive at once in the host's memory."""
        return max((m.host_bytes for m in self.moments), default=0)


def simulate_memory(plan: Plan, hints: Mapping[str, int]) -> MemoryCurve:
    """Walk the forward and the backward of a plan with its births and deaths.

    Outputs of the forward are taken to be dropped by the caller before the backward, unless the backward needs them;
    the inputs of the call are the caller's and not counted. Tangents are, unless they are likely to be absent.

    Args:
        plan: the plan.
        hints: a number for each symbolic size.
    """
    return MemoryCurve(tuple(_walked(plan, hints).moments))


def alive_at_peak(plan: Plan, hints: Mapping[str, int], curve: MemoryCurve) -> list[tuple[str, str, int]]:
    """What is alive at the peak of a plan's curve: the value that each storage is named after, its category and its
    bytes, largest first. Scratch memory of collectives is not among them."""
    peak = max(range(len(curve.moments)), key=lambda i: curve.moments[i].total_bytes, default=-1)
    walk = _walked(plan, hints, watched=peak)
    found = [(name, walk.categories.get(name, "temporaries"), size) for name, size in walk.snapshot.items() if size]
    return sorted(found, key=lambda item: (-item[2], item[0]))


def _walked(plan: Plan, hints: Mapping[str, int], watched: int = -1) -> _Walk:
    walk = _Walk(plan, hints, watched)
    walk.run_in_arena(plan.forward.instructions)
    saved = {v.name for v in plan.saved}
    walk.drop(v.name for v in plan.forward.results if v is not None and v.name not in saved)
    if plan.backward is not None:
        tangents = [i.value for i in plan.graph.inputs if i.kind is InputKind.tangent]
        walk.adopt(t for t in tangents if t.name not in plan.absent)
        walk.run_in_arena((plan.lean[0] if plan.lean else plan.backward).instructions)
    return walk


class _Walk:
    """Storages alive, as references from live names to the storages that they lie in.

    `snapshot` is what is alive at the moment of the number `watched`.
    """

    def __init__(self, plan: Plan, hints: Mapping[str, int], watched: int = -1) -> None:
        self.graph: Graph = plan.graph
        self.watched = watched
        self.snapshot: dict[str, int] = {}
        self.hints = hints
        self.categories = _categories(plan)
        self.roots: dict[str, frozenset[str]] = {}
        self.references: Counter[str] = Counter()
        self.alive: dict[str, int] = {}
        self.by_category: Counter[str] = Counter()
        self.scratch: dict[str, int] = {}
        self.moments: list[Moment] = []

    def run_in_arena(self, instructions: Sequence[Instruction]) -> None:
        """A program, with its arena from the beginning to the end."""
        self.alive[_ARENA] = _rounded(arena_bytes((i.node for i in instructions), self.graph))
        self.by_category["gathered"] += self.alive[_ARENA]
        self.run(instructions)
        self.free(_ARENA, "gathered")

    def run(self, instructions: Iterable[Instruction]) -> None:
        for instruction in instructions:
            node = instruction.node
            sources = views(self.graph, node)
            shared = frozenset(r for name in sources for r in self.roots.get(name, ()))
            is_view = bool(sources)
            in_arena = bool(offsets(node))
            for result in node.results:
                if in_arena:
                    self.alive[result.name] = 0
                elif not is_view:
                    self.allocate(result.name, result.type, padded=instruction.lane == "comm")
                self.roots[result.name] = shared if is_view else frozenset((result.name,))
                self.refer(self.roots[result.name])
            if node.op in OPS and OPS[node.op].lane != "compute":
                self.start(node)
            if node.op == "wait":
                self.finish(_in_flight(node.operands[0].name))
                self.scratch.pop(node.operands[0].name, None)
            if len(self.moments) == self.watched:
                self.snapshot = dict(self.alive)
            self.moments.append(self.moment(node))
            self.drop(instruction.frees)

    def start(self, node: Node) -> None:
        """Until its wait, a collective holds what it sends, in place or as a copy, and its scratch memory."""
        graph = self.graph
        self.scratch[node.name] = _rounded(OPS[node.op].scratch_bytes(node, graph.mesh))
        for value, result in zip(node.operands, node.results, strict=True):
            name = _in_flight(result.name)
            if node.op == "reduce_scatter_start" and is_copied(value.tensor, graph.mesh):
                self.alive[name] = _rounded(padded_bytes(value.tensor, graph.num_shards))
                self.by_category["buckets"] += self.alive[name]
            elif node.op in _SENDS_IN_PLACE:
                sent = self.roots.get(value.name, frozenset())
                self.roots[name] = sent
                self.refer(sent)

    def finish(self, start: str) -> None:
        """A collective that is over lets go of what it sent."""
        self.drop((start,))
        self.free(start, "buckets")

    def moment(self, node: Node) -> Moment:
        """What is alive now. Of the collectives under way the oldest two are served, and have scratch memory."""
        by_category = dict(self.by_category)
        by_category["buckets"] = by_category.get("buckets", 0) + sum(nlargest(NUM_SERVED, self.scratch.values()))
        by_category["temporaries"] = by_category.get("temporaries", 0) + workspace_bytes(node, self.hints)
        host_bytes = by_category.pop(HOST, 0)
        return Moment(node.name, node.phase.value, by_category, host_bytes)

    def adopt(self, values: Iterable[Value]) -> None:
        """Values that come from outside and live until the plan frees them."""
        for value in values:
            self.allocate(value.name, value.type)
            self.roots[value.name] = frozenset((value.name,))
            self.references[value.name] += 1

    def allocate(self, name: str, kind: Type, *, padded: bool = False) -> None:
        """A value is born; with room for equal chunks of all ranks where a collective makes it `padded`."""
        if padded and isinstance(kind, TensorType) and not kind.is_sharded:
            size = _rounded(padded_bytes(kind, self.graph.num_ranks))
        else:
            size = local_bytes(kind, self.graph.mesh, self.hints)
        if isinstance(kind, TensorType) and kind.is_on_host:
            self.categories[name] = HOST
        self.alive[name] = size
        self.by_category[self.categories.get(name, "temporaries")] += size

    def refer(self, roots: Iterable[str]) -> None:
        for root in roots:
            self.references[root] += 1

    def drop(self, names: Iterable[str]) -> None:
        for name in names:
            for root in self.roots.pop(name, ()):
                self.references[root] -= 1
                if self.references[root] == 0:
                    self.free(root, self.categories.get(root, "temporaries"))

    def free(self, root: str, category: str) -> None:
        self.by_category[category] -= self.alive.pop(root, 0)


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


def _categories(plan: Plan) -> dict[str, str]:
    """What each value that is born in the step is for."""
    found: dict[str, str] = {}
    inputs = plan.graph.param_names
    for node in plan.graph.nodes:
        for result in node.results:
            if node.op in ("reduce_scatter_start", "all_reduce_start"):
                found[result.name] = "gradients"
            elif node.op in ("all_gather_start", "unpack") and isinstance(result.type, TensorType):
                found[result.name] = "gradients" if result.type.is_sharded else "gathered"
            elif node.op == "reload_start":
                found[result.name] = "gathered" if node.operands[0].name in inputs else "activations"
            elif node.op in OPS and node.op not in ("cast", "wait"):
                found[result.name] = "buckets"
    for value in plan.saved:
        found.setdefault(value.name, "activations")
    for output in plan.graph.outputs:
        if output.kind is OutputKind.grad and output.value is not None and output.target in inputs:
            if output.phase is not Phase.forward:
                found[output.value.name] = "gradients"
    return found
