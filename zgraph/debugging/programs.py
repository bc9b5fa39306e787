"""The programs that a graph becomes, and the micro-steps in which a check runs them.

A step is k micro-steps under no_sync and one that syncs. Where the model returns more than its loss, each of both
programs comes without the tangents of the rest, too: that is what training a model with logits runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from zgraph.ir import Graph, OutputKind, Phase
from zgraph.passes.plan.no_sync import without_sync
from zgraph.passes.plan.zero_tangents import without_tangents, zero_tangents

SYNCED, NO_SYNC, SECOND, LOSS_ONLY, SMALL = "synced", "no_sync", "second step", "without tangents", "small gradients"
"""Words of a program's name: the synced step; one that accumulates; the one after it; without zero tangents."""

_PHRASES = {
    NO_SYNC: "accumulating under no_sync",
    SECOND: "in the second step",
    SMALL: "with small gradients",
    LOSS_ONLY: "where only the loss is differentiated",
}


@dataclass(frozen=True)
class Programs:
    """Programs that the runtime runs of a graph, each with its forward.

    Args:
        synced: the step that ends with averaged gradients: the graph itself.
        unsynced: the same under no_sync: gradients of stages 0 and 1 stay on the rank.
        loss_only: both without the tangents `zero_tangents`; None where those cannot be left out, but are given.
        zero_tangents: the tangents of all outputs but the loss; none where the loss is not one output among others.
    """

    synced: Graph
    unsynced: Graph
    loss_only: tuple[Graph, Graph] | None
    zero_tangents: frozenset[str]

    @classmethod
    def of(cls, graph: Graph) -> Programs:
        """The programs of a graph, before or after any pass."""
        if not any(o.phase is not Phase.forward for o in graph.outputs):
            return cls(graph, graph, None, frozenset())
        zeros = zero_tangents(graph)
        loss_only = without_tangents(graph, zeros) if zeros else None
        both = (
            None if loss_only is None else (_on_forward(graph, loss_only), _on_forward(graph, without_sync(loss_only)))
        )
        return cls(graph, _on_forward(graph, without_sync(graph)), both, zeros)

    def map(self, change: Callable[[Graph], Graph]) -> Programs:
        """The same of changed graphs."""
        loss_only = None if self.loss_only is None else (change(self.loss_only[0]), change(self.loss_only[1]))
        return replace(self, synced=change(self.synced), unsynced=change(self.unsynced), loss_only=loss_only)

    def program(self, step: MicroStep) -> Graph:
        """The graph that runs in a micro-step."""
        if step.loss_only and self.loss_only is not None:
            return self.loss_only[0 if step.syncs else 1]
        return self.synced if step.syncs else self.unsynced

    @property
    def accumulates(self) -> bool:
        """Whether micro-steps under no_sync run another program, or see what earlier ones left."""
        graph = self.synced
        return bool(graph.mesh) or any(n.op == "accumulate" for n in graph.nodes)

    @property
    def trains(self) -> bool:
        """Whether there is a gradient of a parameter."""
        params = self.synced.param_names
        return any(o.kind is OutputKind.grad and o.target in params for o in self.synced.outputs)


def _on_forward(graph: Graph, derived: Graph) -> Graph:
    """The backward of a derived graph behind the forward of the graph, which all programs share."""
    later = tuple(n for n in derived.nodes if n.phase is not Phase.forward)
    return replace(derived, nodes=(*graph.phase_nodes(Phase.forward), *later))


@dataclass(frozen=True)
class MicroStep:
    """A forward and a backward.

    Args:
        batch: which batch they are given.
        syncs: whether they end a step.
        loss_only: only the loss is differentiated.
        program: what the program is called.
        scale: what tangents are multiplied by.
    """

    batch: int
    syncs: bool = True
    loss_only: bool = False
    program: str = SYNCED
    scale: float = 1.0


Course = tuple[MicroStep, ...]
"""Micro-steps one after another, from the first numbers on. Parameters are updated after each that syncs."""


def courses(programs: Programs, num_micro_steps: int) -> Iterator[Course]:
    """Courses of micro-steps to run of a graph, cheapest first.

    Args:
        programs: of the graph.
        num_micro_steps: how many micro-steps run under no_sync at most.
    """
    for loss_only in (False, True) if programs.zero_tangents else (False,):
        yield from _courses(programs, num_micro_steps, loss_only)


def leading_to(program: str, courses: Iterator[Course]) -> Iterator[Course]:
    """Of each course what leads to a program, if anything does; all of them where the program is empty."""
    for course in courses:
        ends = [at for at, step in enumerate(course, 1) if step.program == program or not program]
        if ends:
            yield course[: ends[-1]]


def _courses(programs: Programs, num_micro_steps: int, loss_only: bool) -> Iterator[Course]:
    def step(batch: int, *words: str, syncs: bool = True) -> MicroStep:
        return MicroStep(batch, syncs, loss_only, named(*words, loss_only=loss_only))

    yield (step(0), step(1, SECOND)) if programs.trains else (step(0),)
    if not (programs.trains and programs.accumulates):
        return
    for count in range(1, num_micro_steps + 1):
        unsynced = [step(batch, NO_SYNC, syncs=False) for batch in range(count)]
        first = *unsynced, step(count, NO_SYNC)
        more = step(count + 1, SECOND, NO_SYNC, syncs=False), step(count + 2, SECOND, NO_SYNC)
        yield first if count < num_micro_steps else (*first, *more)


def rounded(courses: Iterator[Course]) -> Iterator[Course]:
    """Courses to run in real dtypes: first steps, with at most one under no_sync, and one with small gradients."""
    for course in courses:
        end = next(at for at, step in enumerate(course) if step.syncs) + 1
        if end <= 2:
            yield course[:end]
        if end == 1:
            (step,) = course[:1]
            words = () if step.program == SYNCED else (step.program,)
            yield (replace(step, scale=SMALLER, program=", ".join((*words, SMALL))),)


SMALLER = 2.0**-30
"""Scale that makes gradients so small that a dtype with a narrower exponent range loses them."""


def named(*words: str, loss_only: bool = False) -> str:
    """The name of a program."""
    return ", ".join((LOSS_ONLY, *words) if loss_only else words or (SYNCED,))


def phrase(program: str) -> str:
    """Where a failure is, in words; empty for the synced step."""
    return ", ".join(_PHRASES[word] for word in program.split(", ") if word in _PHRASES)
