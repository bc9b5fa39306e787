"""Whether a graph computes what the graph before it did: terms of all outputs, for all of the programs of a step.

Where a pass has placed the graph on ranks, what it must compute follows from what it says of its inputs (the stage of
each parameter, its dtype at rest) and from nothing else: a gradient is averaged over the ranks exactly once, after
what earlier micro-steps left was added (stages 0 and 1); a buffer's new value is the first rank's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from zgraph.certify.spelled import rounded, spelled
from zgraph.certify.steps import Steps
from zgraph.certify.terms import ZERO, Meaning, Terms, meaning
from zgraph.ir import (
    DType,
    Graph,
    Input,
    InputKind,
    Output,
    OutputKind,
    TensorType,
    Value,
    model_axes,
    num_data_ranks,
)
from zgraph.ir.parts import whole_along
from zgraph.ir.symbols import Dim
from zgraph.ir.verifier import Fault
from zgraph.passes.plan.no_sync import without_sync
from zgraph.passes.plan.zero_tangents import without_tangents, zero_tangents

RESENDS = frozenset({"place", "partition", "fit", "keep", "recompute", "offload", "fuse", "float8", "float8-gathers"})
"""Passes that may change what goes over the wire or waits for the backward; no other may."""


CLEANS = frozenset({"canonicalize", "dce"})
"""Passes that take out what nothing needs; what that sent, too."""

LOSS_ONLY = " where only the loss is differentiated"


@dataclass(frozen=True)
class Programs:
    """Meanings of a graph's programs: the synced step, one under no_sync, and both without zero tangents."""

    graph: Graph
    synced: Meaning
    unsynced: Meaning | None
    loss_only: tuple[Meaning, Meaning] | None


class Equality:
    """Compares graphs of one run, whose terms are in one table.

    Args:
        captured: the graph that all others must equal.
        reduce_dtype: the dtype in which gradients are averaged; None takes the one that they come in.
    """

    def __init__(self, captured: Graph, reduce_dtype: DType | None = None) -> None:
        self.table, self.reduce_dtype = Terms(), reduce_dtype
        self.masters = {
            i.target: i.master or i.value.type.dtype for i in captured.params if isinstance(i.value.type, TensorType)
        }
        self.zeros = zero_tangents(captured)

    def programs(self, graph: Graph) -> Programs:
        """Meanings of a graph's programs."""
        synced = self.read(graph)
        if not any(o.kind is OutputKind.grad for o in graph.outputs):
            return Programs(graph, synced, None, None)
        unsynced = without_sync(graph)
        loss_only = without_tangents(graph, self.zeros) if self.zeros else None
        return Programs(
            graph,
            synced,
            self.read(unsynced, unsynced=True) if unsynced.outputs != graph.outputs else None,
            None if loss_only is None else (self.read(loss_only), self.read(without_sync(loss_only), unsynced=True)),
        )

    def zeroed(self, graph: Graph) -> tuple[Meaning, Meaning]:
        """Meanings of a graph whose zero tangents are taken as zero: synced, and under no_sync."""
        return self.read(graph, self.zeros), self.read(without_sync(graph), self.zeros, unsynced=True)

    def loss_only(self, programs: Programs) -> Iterator[Fault]:
        """In what a graph's programs without zero tangents are other than with zeros in their place."""
        if programs.loss_only is not None:
            for known, made in zip(self.zeroed(programs.graph), programs.loss_only, strict=True):
                yield from self.alike(
                    known, programs.graph, made, programs.graph, places=False, unsynced=False, what=LOSS_ONLY
                )

    def read(self, graph: Graph, zeros: frozenset[str] = frozenset(), *, unsynced: bool = False) -> Meaning:
        return meaning(graph, self.table, self.masters, zeros, unsynced=unsynced)

    def faults(self, before: Programs, after: Programs, step: str) -> Iterator[Fault]:
        """In what a graph is another than the one before it, of which a pass has made it.

        Args:
            before: what it must compute.
            after: what it computes.
            step: the pass's name.
        """
        old, new = before.graph, after.graph
        if len(old.outputs) != len(new.outputs):
            yield None, f"returns {len(new.outputs)} values, not {len(old.outputs)}"
            return
        places = (old.mesh, old.inputs, _dtypes(old)) != (new.mesh, new.inputs, _dtypes(new))
        if places:
            yield from self.placed(old, new)
        places &= step != "place"  # along a model axis, outputs are what they were
        yield from self.alike(before.synced, before.graph, after.synced, new, places, unsynced=False)
        if before.synced.effects != after.synced.effects:
            yield None, "random, writing or opaque ops run in another order, or not as often, as before"
        if after.unsynced is not None:
            known = before.unsynced or before.synced
            yield from self.alike(known, old, after.unsynced, new, places, unsynced=True, what=" under no_sync")
        elif before.unsynced is not None and any(n.op == "accumulate" for n in old.nodes):
            yield None, "no gradient accumulates under no_sync any more"
        if after.loss_only is not None:
            zeroed = before.loss_only or self.zeroed(old)
            for known, made, unsynced in zip(zeroed, after.loss_only, (False, True), strict=True):
                what = LOSS_ONLY + (" under no_sync" if unsynced else "")
                yield from self.alike(known, old, made, new, places, unsynced=unsynced, what=what)
        if not places and step not in RESENDS:
            yield from self.resent(before, after, step)

    def fused(self, old: Graph, new: Graph) -> Iterator[Fault]:
        """In what a graph with other kernels is another than the one before it, both spelled out in scalar steps."""
        if old.mesh or new.mesh or old.inputs != new.inputs or len(old.outputs) != len(new.outputs):
            yield None, "has other inputs or outputs than the graph before it"
            return
        table = Steps()
        for zeros in (frozenset(), self.zeros) if self.zeros else (frozenset(),):
            loss_only = (without_tangents(new, self.zeros) or new) if zeros else new
            what = LOSS_ONLY if zeros else ""
            known, made = spelled(old, table, zeros), spelled(loss_only, table)
            yield from self.alike(known, old, made, loss_only, places=False, unsynced=False, what=what)
            if known.effects != made.effects:
                yield None, "random, writing or opaque ops run in another order, or not as often, as before"
            narrow = {(term, dtype) for _, term, dtype in rounded(old, known)}
            for position, term, dtype in rounded(loss_only, made) if not zeros else ():
                if (term, dtype) not in narrow:
                    yield position, f"rounds to {dtype.value} what was not rounded to it before"
        for before, after in zip(old.outputs, new.outputs, strict=True):
            if before.value is not None and after.value is not None and before.value.type != after.value.type:
                yield None, f"the {_name(new, after)} has become {after.value.type}, and was {before.value.type}"

    def alike(
        self, known: Meaning, old: Graph, made: Meaning, new: Graph, places: bool, *, unsynced: bool, what: str = ""
    ) -> Iterator[Fault]:
        """The outputs of a program that are not what they must be."""
        for index, (output, term) in enumerate(zip(new.outputs, made.outputs, strict=True)):
            source, wanted = old.outputs[index], known.outputs[index]
            if (source.kind, source.target) != (output.kind, output.target):
                yield None, f"output {index} is the {_name(new, output)}, not the {_name(old, source)}"
            elif term not in self.allowed(source, wanted, new, places, unsynced):
                position = _culprit(new, made, output, set(known.terms.values())) if output.value else None
                yield position, f"makes that the {_name(new, output)}{what} is not what the graph before it computes"
            elif not places and source.phase is not output.phase:
                yield (
                    None,
                    f"the {_name(new, output)} is returned in phase {output.phase.value}, not in the phase before",
                )

    def allowed(
        self, source: Output, wanted: int | None, new: Graph, places: bool, unsynced: bool
    ) -> tuple[int | None, ...]:
        """Terms that an output may have; if `places`, those that placing the graph makes of the term before."""
        nothing = (None, ZERO) if wanted in (None, ZERO) else ()
        entry = next((i for i in new.inputs if i.value.name == source.target), None)
        if not places or wanted is None or wanted == ZERO or entry is None or source.value is None:
            return (*nothing, wanted)
        is_shared = source.kind is OutputKind.mutation and entry.kind is InputKind.buffer
        if is_shared and num_data_ranks(new.mesh) > 1:
            return wanted, self.table.reduced("root", wanted)
        if source.kind is not OutputKind.grad or entry.kind is not InputKind.param:
            return (*nothing, wanted)
        return (self.at_rest(wanted, source.value, entry, new, unsynced),)

    def at_rest(self, term: int, raw: Value, entry: Input, new: Graph, unsynced: bool) -> int:
        """A parameter's gradient as the stage wants it."""
        table, dtype, stage = self.table, raw.tensor.dtype, entry.stage or 0
        rest = entry.master or entry.value.tensor.dtype
        if num_data_ranks(new.mesh) == 1:
            return table.cast(term, dtype, rest)
        summed = self.reduce_dtype or dtype
        term = table.cast(term, dtype, summed)
        if stage < 2:
            if unsynced:
                return term
            term = table.of("sum", entry.target, term)
        return table.cast(table.reduced("mean", term), summed, rest)

    def placed(self, old: Graph, new: Graph) -> Iterator[Fault]:
        """Faults in the inputs after a pass that places: other numbers, names, kinds, targets, stages or shapes."""
        if len(old.inputs) != len(new.inputs):
            yield None, f"has {len(new.inputs)} inputs, not {len(old.inputs)}"
            return
        for before, after in zip(old.inputs, new.inputs, strict=True):
            name = before.value.name
            if (before.kind, name, before.target, before.offload) != (
                after.kind,
                after.value.name,
                after.target,
                after.offload,
            ):
                yield None, f"the input %{name} has become another: %{after.value.name}"
            elif before.stage is not None and before.stage != after.stage:
                yield None, f"%{name} is wanted at stage {before.stage}, and has become stage {after.stage}"
            elif isinstance(before.value.type, TensorType) and _whole_shape(before, old) != _whole_shape(after, new):
                yield None, f"the input %{name} has another shape than before"

    def resent(self, before: Programs, after: Programs, step: str) -> Iterator[Fault]:
        """Faults in communication and in saved values: a collective more or less than before, or more saved values.

        After passes in `CLEANS`, fewer collectives are no fault.
        """
        sent, was = Counter(after.synced.sent), Counter(before.synced.sent)
        less = () if step in CLEANS else (was - sent)
        for how, phase, _ in [*(sent - was), *less]:
            yield None, f"what is sent has changed: a {how} in phase {phase.value} more or less than before"
        if not set(_saved(after)) <= set(_saved(before)):
            yield None, "more lives from the forward to the backward than before"


def _whole_shape(entry: Input, graph: Graph) -> tuple[Dim, ...]:
    """The shape of an input whose parts along the model axes are put together."""
    kind = entry.value.tensor
    for index, axis in enumerate(model_axes(graph.mesh)):
        kind = whole_along(kind, index, axis.size)
    return kind.shape


def _dtypes(graph: Graph) -> list[DType | None]:
    """Those of the outputs: on one rank, a gradient in its master's dtype may be all that placing changes."""
    kinds = [o.value and o.value.type for o in graph.outputs]
    return [k.dtype if isinstance(k, TensorType) else None for k in kinds]


def _saved(programs: Programs) -> Iterator[tuple[int, str]]:
    """The terms of what lives from the forward to the backward, and where it is."""
    graph, terms = programs.graph, programs.synced.terms
    made = {r.name: r for n in graph.nodes if n.phase.rank == 0 for r in n.results}
    for node in graph.nodes:
        if node.phase.rank and node.op != "release":
            for value in node.operands:
                if value.name in made:
                    kind = value.type
                    yield terms[value.name], kind.space if isinstance(kind, TensorType) else ""


def _name(graph: Graph, output: Output) -> str:
    targets = {i.value.name: i.target or f"%{i.value.name}" for i in graph.inputs}
    if output.kind is OutputKind.output:
        return f"output %{output.value.name}" if output.value else "output"
    what = "gradient" if output.kind is OutputKind.grad else "new value"
    return f"{what} of {targets.get(output.target, output.target)}"


def _culprit(graph: Graph, made: Meaning, output: Output, known: set[int]) -> int | None:
    """The first node behind an output that makes what the graph before it does not have."""
    wanted, found = {output.value.name} if output.value else set(), None
    for position in range(len(graph.nodes) - 1, -1, -1):
        node = graph.nodes[position]
        if any(r.name in wanted for r in node.results):
            wanted.update(v.name for v in node.operands)
            if any(r.name in wanted and made.terms.get(r.name) not in known for r in node.results):
                found = position
    return found
