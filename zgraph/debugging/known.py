"""A graph that is right, random inputs for it on simulated ranks, and what it gives, which others must give too."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

from zgraph.bridge.aten import TO_TORCH
from zgraph.debugging.draws import Disturb, draw_numbers
from zgraph.debugging.dtypes import exactly_coded, in_dtype
from zgraph.debugging.numbers import Numbers
from zgraph.debugging.outcome import Difference, differences
from zgraph.debugging.programs import Course, MicroStep, Programs
from zgraph.debugging.training import Outputs, Rates, Setting, Training
from zgraph.interpreter import Ranks, mean
from zgraph.ir import DType, Graph, Input, InputKind, Output, OutputKind
from zgraph.passes.plan.zero_tangents import zero_tangents

TOLERANCES: Mapping[DType, tuple[float, float]] = {DType.f64: (1e-8, 1e-6), DType.f32: (1e-3, 1e-3)}
"""By the dtype of a check: how much of its largest number an output may differ, and what counts as that number where
it is smaller (gradients that cancel out are nothing but rounding)."""

RATE_FLOOR = 1e-3
"""Gradients with no number above this change their parameter less: they may be nothing but rounding."""


class Known(Protocol):
    """Reference that a graph is compared with."""

    captured: Graph

    def courses(self, courses: Iterator[Course]) -> Iterator[Course]:
        """Which micro-steps are compared."""

    def training(self, candidate: Graph, programs: Programs, own: Collection[int]) -> Training:
        """A training with the programs of a graph that stems from the captured one."""

    def rates(self, course: Course, at: int) -> Rates:
        """How parameters are updated after a micro-step."""

    def differing(
        self, course: Course, at: int, after: Programs, found: Outputs, tolerance: float | None, own: Collection[int]
    ) -> Iterator[Difference]:
        """The outputs of a micro-step that differ by more than they may, in order."""


class Reference:
    """A graph, random inputs for it on `num_ranks` ranks, and what it gives on them.

    Args:
        captured: the graph; one for a mesh has as many ranks as that.
        num_ranks: how many are simulated.
        seed: of the inputs.
        sizes: of symbols.
        dtype: what all floating-point numbers are; None leaves each what the graph says.
        numbers: the inputs, if they are not drawn here.
        disturb: changes the operands of ops that compute.
        draws_in_own: random numbers are drawn in the dtype that the graph says.
    """

    def __init__(
        self,
        captured: Graph,
        num_ranks: int,
        seed: int = 0,
        sizes: Mapping[str, int] | None = None,
        dtype: DType | None = None,
        *,
        numbers: Numbers | None = None,
        disturb: Disturb | None = None,
        draws_in_own: bool = False,
    ) -> None:
        self.captured, self.dtype, self.disturb, self.draws_in_own = captured, dtype, disturb, draws_in_own
        self.num_ranks = captured.num_ranks if captured.mesh else num_ranks
        self.numbers = numbers or Numbers(self.as_run(captured), self.num_ranks, seed, sizes or {})
        self.zero_tangents = zero_tangents(captured)
        self._known: dict[Course, _Known] = {}
        self._as_run: tuple[Programs, Programs] | None = None

    @property
    def raw(self) -> Outputs:
        """Outputs of the captured graph in the first micro-step."""
        return self.outputs((MicroStep(0),), 0)

    def as_run(self, graph: Graph) -> Graph:
        """The graph with numbers of the dtype that is checked in."""
        if self.dtype is None:
            return exactly_coded(graph)
        return in_dtype(graph, self.dtype, draws_in_own=self.draws_in_own)

    def outputs(self, course: Course, at: int) -> Outputs:
        """Outputs of the captured graph in a micro-step."""
        return self._after(course[: at + 1]).outputs

    def rates(self, course: Course, at: int) -> Rates:
        """How parameters are updated after a micro-step that syncs."""
        return self._after(course[: at + 1]).rates

    def _after(self, steps: Course) -> _Known:
        """Outputs of the captured graph in the last of some micro-steps. Courses that begin the same share the runs."""
        key = steps if self.captured.mesh else _unnamed(steps)
        if key not in self._known:
            if before := steps[:-1]:
                known = self._after(before)
                training = known.training.fork()
                if before[-1].syncs:
                    training.update(known.rates)
            else:
                training = self.training(self.captured, self._programs)
            outputs = training.run(steps[-1])
            self._known[key] = _Known(outputs, training.rates(RATE_FLOOR), training)
        return self._known[key]

    @cached_property
    def _programs(self) -> Programs:
        """Programs of the captured graph. A graph for a single device is the same in all of them."""
        if self.captured.mesh:
            return Programs.of(self.captured)
        return Programs(self.captured, self.captured, None, self.zero_tangents)

    def courses(self, courses: Iterator[Course]) -> Iterator[Course]:
        """All of them."""
        return courses

    def training(self, candidate: Graph, programs: Programs, own: Collection[int] = ()) -> Training:
        """A training with programs of a graph that stems from the captured one."""
        draws = draw_numbers(self.captured, candidate)
        setting = Setting(self.numbers, self.zero_tangents, draws, self.disturb, own)
        if self._as_run is None or self._as_run[0] is not programs:
            self._as_run = programs, programs.map(self.as_run)
        return Training(self._as_run[1], setting)

    def run(self, graph: Graph, held: Mapping[str, Ranks] | None = None, batch: int = 0) -> Outputs:
        """The outputs of some form of the captured graph alone, with what earlier micro-steps left."""
        training = self.training(graph, Programs(graph, graph, None, self.zero_tangents))
        training.interpreter.held.update(held or {})
        outputs = training.run(MicroStep(batch))
        assert not training.interpreter.held
        return outputs

    def differing(
        self, course: Course, at: int, after: Programs, found: Outputs, tolerance: float | None, own: Collection[int]
    ) -> Iterator[Difference]:
        """The outputs of a micro-step that differ by more than they may, in order."""
        usual, floor = TOLERANCES[self.dtype or DType.f32]
        wanted = self.wanted(course, at, after, own=own)
        for index, (a, b) in enumerate(zip(wanted, found, strict=True)):
            each = differences(self.captured, index, a, b, floor)
            worst = max(each, key=lambda d: d.error, default=None)
            if worst is not None and worst.error > (usual if tolerance is None else tolerance):
                yield worst

    def wanted(
        self, course: Course, at: int, after: Programs, reduce_dtype: DType | None = None, own: Collection[int] = ()
    ) -> Outputs:
        """Outputs that a micro-step of `after` must give."""
        begun = next((i + 1 for i in range(at - 1, -1, -1) if course[i].syncs), 0)
        raws = [self.outputs(course, i) for i in range(begun, at + 1)]
        step, waiting = course[at], waiting_in(after.synced)
        return self.expected(after.program(step), raws, reduce_dtype, syncs=step.syncs, own=own, waiting=waiting)

    def expected(
        self,
        after: Graph,
        raws: Sequence[Outputs] = (),
        reduce_dtype: DType | None = None,
        *,
        syncs: bool = True,
        own: Collection[int] = (),
        waiting: Collection[str] = (),
    ) -> Outputs:
        """Outputs that `after` must give: the captured graph's, with gradients averaged and the first rank's buffers.

        Args:
            after: what passes have made of the captured graph.
            raws: what the captured graph gave in the micro-steps of this step, this one last; by default the first.
            reduce_dtype: the dtype in which gradients are averaged; None takes their own.
            syncs: whether the micro-step ends the step.
            own: positions of outputs that each rank still has its own of.
            waiting: parameters whose gradients stay on the rank until the step ends, by the value's name.
        """
        raws = raws or [self.raw]
        kinds = {i.value.name: i for i in after.inputs}
        is_placed = bool(after.mesh) and not self.captured.mesh
        reduce_dtype = self.dtype or reduce_dtype
        found: Outputs = []
        for index, (output, made) in enumerate(zip(self.captured.outputs, after.outputs, strict=True)):
            ranks, target = raws[-1][index], kinds.get(output.target)
            if ranks is not None and is_placed and target is not None and index not in own:
                if output.kind is OutputKind.mutation and target.kind is InputKind.buffer:
                    ranks = [ranks[0]] * len(ranks)
                elif _is_gradient(output, target):
                    each = [raw[index] for raw in raws]
                    waits = output.target in waiting
                    ranks = _over_ranks([r for r in each if r is not None], reduce_dtype, waits, syncs)
            if ranks is not None and made.value is not None and target is not None and _is_gradient(output, target):
                ranks = [r.to(TO_TORCH[self.dtype or made.value.tensor.dtype]) for r in ranks]
            found.append(ranks)
        return found


@dataclass(frozen=True)
class _Known:
    """Outputs of a captured graph in a micro-step, and the training that goes on from there."""

    outputs: Outputs
    rates: Rates
    training: Training


def _unnamed(steps: Course) -> Course:
    """Micro-steps of a graph that is the same in all programs: they are told apart by what they are given."""
    same = [replace(step, program="") for step in steps]
    return (*same[:-1], replace(same[-1], syncs=True))


def waiting_in(graph: Graph) -> frozenset[str]:
    """Parameters of a placed graph whose gradients stay on the rank until the step ends, by the value's name.

    Their stage says so: it is 0 or 1. Where none is said yet, what the graph does is right.
    """
    held = {n.option("target") for n in graph.nodes if n.op == "accumulate"}
    return frozenset(i.value.name for i in graph.params if (i.target in held if i.stage is None else i.stage < 2))


def _is_gradient(output: Output, target: Input) -> bool:
    return output.kind is OutputKind.grad and target.kind is InputKind.param


def _over_ranks(each: Sequence[Ranks], reduce_dtype: DType | None, waits: bool, syncs: bool) -> Ranks:
    """A gradient in the last of some micro-steps: one that waits is the rank's own, and the mean of sums in the end."""
    last = [_cast(ranks, reduce_dtype) for ranks in (each if waits and syncs else each[-1:])]
    total = last[0]
    for more in last[1:]:
        total = [a + b for a, b in zip(total, more, strict=True)]
    return total if waits and not syncs else [mean(total)] * len(total)


def _cast(ranks: Iterable[object], dtype: DType | None) -> Ranks:
    return [r if dtype is None else r.to(TO_TORCH[dtype]) for r in ranks]  # type: ignore[attr-defined]
