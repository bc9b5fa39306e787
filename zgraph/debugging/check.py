"""Whether a graph does what the graph that it was made of does, on simulated ranks with random inputs.

All programs that the runtime makes of it are run (`programs.py`): the step, steps that accumulate under no_sync, each
without the tangents that may be zero, and the step after an update.

Numbers are of one dtype, fp64 where nothing else is wanted, whatever the graph says: rounding is far below the
tolerance then, and what is above it is a mistake. `rounding.py` looks for mistakes of rounding, in real dtypes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch

from zgraph.debugging.due import misplaced
from zgraph.debugging.known import Known, Reference
from zgraph.debugging.memory import check_memory
from zgraph.debugging.outcome import Difference, Failure, described
from zgraph.debugging.programs import SYNCED, Course, Programs, courses, leading_to, phrase
from zgraph.debugging.rounding import NUM_DRAWS, Rounding
from zgraph.debugging.threads import suited
from zgraph.errors import CheckError
from zgraph.ir import DType, Graph, OutputKind, verify

NUM_MICRO_STEPS = 2
"""How many micro-steps run under no_sync, if nothing is said."""

NUM_KEPT = 12
"""Of about as many micro-steps of the captured graph the outputs are kept, for each dtype and each change of it."""


def reference(
    captured: Graph,
    num_ranks: int = 1,
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
    dtype: DType | None = DType.f64,
    max_bytes: int | None = None,
    *,
    reduce_dtype: DType | None = None,
) -> Known:
    """A graph with what it gives, for others to be compared with.

    Args:
        captured: the graph that is right.
        num_ranks: how many ranks are simulated, where the graph is for no mesh.
        seed: of the random inputs.
        sizes: a number for each symbolic size.
        dtype: f64 or f32, which all floating-point numbers are taken to be; None for those that the graph says.
        max_bytes: memory to use at most; by default half of what is free.
        reduce_dtype: the dtype in which gradients are averaged, where numbers have the dtypes that the graph says.

    Raises:
        BudgetError: it would take more memory.
        CheckError: the graph cannot be run here, or gives no numbers.
        VerifyError: the graph is not valid.
    """
    verify(captured)
    num_runs = NUM_KEPT * (1 if dtype else 2 + NUM_DRAWS)
    check_memory(captured, num_ranks, sizes or {}, dtype or DType.f64, max_bytes, num_runs)
    found: Known
    try:
        with suited(captured):
            if dtype is None:
                rounding = Rounding(captured, num_ranks, seed, sizes, reduce_dtype)
                found, raw = rounding, rounding.exact.raw
            else:
                exact = Reference(captured, num_ranks, seed, sizes, dtype)
                found, raw = exact, exact.raw
    except Exception as error:
        raise CheckError(
            f"the graph to compare with cannot be run here: {type(error).__name__}: {error}. Trace the model on a "
            "processor, or reduce with a command that runs it: zgraph reduce --check"
        ) from error
    floats = [r for ranks in raw for r in ranks or () if isinstance(r, torch.Tensor) and r.is_floating_point()]
    if floats and not any(bool(r.isfinite().any()) for r in floats):
        raise CheckError("the graph to compare with gives no finite number for these inputs; take another --seed")
    return found


def examine(
    known: Known,
    candidate: Graph,
    *,
    tolerance: float | None = None,
    own: Collection[int] | None = None,
    micro_steps: int = NUM_MICRO_STEPS,
    only: str = "",
    programs: Programs | None = None,
) -> Failure | None:
    """How a graph fails to do what another does; None where it does.

    Args:
        known: what it is compared with.
        candidate: the graph.
        tolerance: how much of its largest number an output may differ; by default what `TOLERANCES` says, or in real
            dtypes how many times what rounding makes of it.
        own: of a graph in which a part of what places it on ranks is done, the positions of outputs that are not
            averaged over the ranks yet; None for any other graph. Outputs of such a one may be in other places than
            what they belong to.
        micro_steps: how many run under no_sync at most.
        only: the one program to look at, by its name; empty for all.
        programs: what the runtime runs of the graph, if not what follows from it.
    """
    with suited(candidate):
        return _Examination(known, candidate, tolerance, own, programs).run(micro_steps, only)


class _Examination:
    """One graph, in all of its programs."""

    def __init__(
        self,
        known: Known,
        candidate: Graph,
        tolerance: float | None,
        own: Collection[int] | None,
        programs: Programs | None,
    ) -> None:
        self.known, self.candidate, self.tolerance, self.own = known, candidate, tolerance, own or ()
        self.is_partly_placed = own is not None
        self.programs = programs
        self.running = ""

    def run(self, micro_steps: int, only: str) -> Failure | None:
        """The first failure."""
        try:
            verify(_returning(self.candidate) if self.is_partly_placed else self.candidate)
            count, wanted = len(self.candidate.outputs), len(self.known.captured.outputs)
            if count != wanted:
                text = f"there are {count} outputs, not {wanted}"
                return _differs(Difference(0, "the list of outputs", 0, math.inf, text), SYNCED)
            programs = self.programs or Programs.of(self.candidate)
            for course in leading_to(only, self.known.courses(courses(programs, micro_steps))):
                if (failure := self.course(course, programs)) is not None:
                    return failure
        except Exception as error:  # whatever an op says of operands that do not fit
            return Failure.raised(error, program=self.running)
        return None

    def course(self, course: Course, programs: Programs) -> Failure | None:
        """The first failure in a course."""
        training = self.known.training(self.candidate, programs, self.own)
        for at, step in enumerate(course):
            self.running = step.program
            if at and course[at - 1].syncs:
                training.update(self.known.rates(course, at - 1))
            found = training.run(step)
            for wrong in self.known.differing(course, at, programs, found, self.tolerance, self.own):
                return _differs(wrong, step.program)
        if course[0].program == SYNCED:
            for index, text in misplaced(self.candidate, self.own):
                return Failure("misplaced", "", f"{described(self.candidate, index)}: {text}", program=SYNCED)
        return None


def _returning(graph: Graph) -> Graph:
    """The graph with what it returns belonging to no input."""
    return replace(graph, outputs=tuple(replace(o, kind=OutputKind.output, target="") for o in graph.outputs))


def differs(
    known: Known, candidate: Graph, *, tolerance: float | None = None, own: Collection[int] = ()
) -> Difference | None:
    """The first output of a graph that differs from what another gives; None where all are within the tolerance.

    Args:
        known: what it is compared with.
        candidate: a valid graph.
        tolerance: how much of its largest number an output may differ; by default what `TOLERANCES` says.
        own: positions of outputs that are not averaged over the ranks yet.
    """
    failure = examine(known, candidate, tolerance=tolerance, own=own)
    return None if failure is None else failure.difference


def names_of(known: Known, candidate: Graph, micro_steps: int = NUM_MICRO_STEPS) -> tuple[str, ...]:
    """The programs that a graph is checked in."""
    found = known.courses(courses(Programs.of(candidate), micro_steps))
    return tuple(dict.fromkeys(step.program for course in found for step in course))


def _differs(found: Difference, program: str) -> Failure:
    where = phrase(program)
    return Failure("differs", "", f"{where}, {found}" if where else str(found), found, program)


__all__ = ["NUM_MICRO_STEPS", "Course", "Known", "differs", "examine", "names_of", "reference"]
