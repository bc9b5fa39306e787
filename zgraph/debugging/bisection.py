"""Which pass, and which single rewrite of it, made a graph wrong: found by running graphs, with no hint.

A binary search over the graphs after each pass finds the first wrong one. What its pass did is cut into hunks, and
delta debugging finds the least of them that is wrong on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from zgraph.debugging.check import NUM_MICRO_STEPS, examine
from zgraph.debugging.ddmin import minimal
from zgraph.debugging.hunks import Change, Hunks, print_hunk
from zgraph.debugging.known import Known
from zgraph.debugging.outcome import Failure
from zgraph.errors import CheckError
from zgraph.ir import Graph, Node, model_axes
from zgraph.passes import Context, Pipeline
from zgraph.passes.core.pipeline import print_pass, uncollected
from zgraph.runfile.sources import Sources, line_of

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Rewrite:
    """A part of what a pass did.

    Args:
        lines: nodes, inputs and outputs that it took away (-), put there (+) and moved (>).
        sources: the user's lines that they come from, with their places.
        num_rewrites: how many such parts the pass made.
    """

    lines: tuple[str, ...]
    sources: tuple[str, ...]
    num_rewrites: int


@dataclass(frozen=True)
class Culprit:
    """Pass that made a graph wrong.

    Args:
        step: the pass, as the recipe writes it.
        position: which of the steps it is, from 1 on.
        num_steps: how many there are.
        failure: what is wrong with the graph that it made, or the error that it raised.
        rewrite: the least part of what it did that is wrong; None where it raised an error.
        num_checks: how many graphs were checked.
    """

    step: str
    position: int
    num_steps: int
    failure: Failure
    rewrite: Rewrite | None
    num_checks: int


@dataclass(frozen=True)
class Steps:
    """The graphs of a run, in order.

    Args:
        graphs: each with the pass that made it; the first is what all of them are compared with.
        crash: the pass that then raised an error, and the error.
    """

    graphs: tuple[tuple[str, Graph], ...]
    crash: tuple[str, Failure] | None = None

    def __post_init__(self) -> None:
        axes = {axis.name: None for _, graph in self.graphs for axis in model_axes(graph.mesh)}
        if axes:
            raise CheckError(
                f"graphs along the axis {', '.join(axes)} are not compared by numbers: simulated ranks have a part of "
                "the batch each. zgraph verify compares them by their terms"
            )


def run_steps(graph: Graph, pipeline: Pipeline, context: Context) -> Steps:
    """Run passes one by one until one of them raises an error."""
    graphs = [("captured", graph)]
    with uncollected():
        made = pipeline.steps(graph, context)
        for step in pipeline.passes:
            try:
                graph = next(made).after
            except Exception as error:  # of the pass, whatever it is: that is what is looked for
                return Steps(tuple(graphs), (print_pass(step), Failure.raised(error, step.name)))
            graphs.append((print_pass(step), graph))
    return Steps(tuple(graphs))


def bisect(
    known: Known,
    steps: Steps,
    *,
    tolerance: float | None = None,
    micro_steps: int = NUM_MICRO_STEPS,
    sources: Sources | None = None,
    tell: Tell = lambda text: None,
) -> Culprit | None:
    """The pass and the least part of what it did after which a graph is wrong; None where none is.

    Args:
        known: the first graph, with what it gives.
        steps: the graphs after each pass.
        tolerance: how much of its largest number an output may differ; by default what `known.TOLERANCES` says.
        micro_steps: how many run under no_sync at most.
        sources: the user's lines, as `RunFile.sources` has them.
        tell: is told what is done, for those who wait.
    """
    return Search(known, steps, tolerance, micro_steps, sources or {}, tell).culprit()


class Search:
    """Looks for the first wrong graph of a run, in the program in which the last one is found to be wrong."""

    def __init__(
        self,
        known: Known,
        steps: Steps,
        tolerance: float | None = None,
        micro_steps: int = NUM_MICRO_STEPS,
        sources: Sources | None = None,
        tell: Tell = lambda text: None,
    ) -> None:
        self.known, self.steps, self.tolerance, self.micro_steps = known, steps, tolerance, micro_steps
        self.sources, self.tell = sources or {}, tell
        self.graphs = [graph for _, graph in steps.graphs]
        self.num_checks, self.program = 0, ""
        self.num_steps = len(steps.graphs) - 1 + (steps.crash is not None)

    def culprit(self) -> Culprit | None:
        """The pass that made the first wrong graph, and what of it is to blame."""
        found = self.first()
        if found is None:
            return self.crashed()
        wrong, failure = found
        rewrite = self.rewrite(self.graphs[wrong - 1], self.graphs[wrong], failure)
        return Culprit(self.steps.graphs[wrong][0], wrong, self.num_steps, failure, rewrite, self.num_checks)

    def first(self) -> tuple[int, Failure] | None:
        """The position of the first wrong graph, and how it is wrong; None where the last one is right.

        Each of the graphs before the one found is right, as far as it was looked at; the one before it is.
        """
        right, wrong = 0, len(self.graphs) - 1
        failure = self.examined(self.graphs[-1], f"the graph after {self.steps.graphs[-1][0]}")
        if failure is None:
            return None
        self.program = failure.program
        while wrong - right > 1:
            middle = (right + wrong) // 2
            found = self.examined(self.graphs[middle], f"the graph after {self.steps.graphs[middle][0]}")
            if found is None:
                right = middle
            else:
                wrong, failure = middle, found
        return wrong, failure

    def crashed(self) -> Culprit | None:
        if self.steps.crash is None:
            return None
        step, failure = self.steps.crash
        return Culprit(step, self.num_steps, self.num_steps, failure, None, self.num_checks)

    def examined(self, graph: Graph, what: str, own: Collection[int] | None = None) -> Failure | None:
        self.num_checks += 1
        self.tell(f"check {self.num_checks}: {what}")
        return examine(
            self.known, graph, tolerance=self.tolerance, own=own, micro_steps=self.micro_steps, only=self.program
        )

    def rewrite(self, before: Graph, after: Graph, failure: Failure) -> Rewrite:
        """The least part of what is between two graphs that fails as they do together."""
        hunks = Hunks(before, after)
        is_placing = before.mesh != after.mesh

        def fails(chosen: Sequence[int]) -> bool:
            own = hunks.unchosen_outputs(set(chosen)) if is_placing else None
            what = f"{len(chosen):,} of {len(hunks):,} rewrites"
            found = self.examined(hunks.apply(set(chosen)), what, own)
            return found is not None and found.is_like(failure)

        changes = [change for number in minimal(range(len(hunks)), fails) for change in hunks.hunks[number]]
        return Rewrite(tuple(print_hunk(changes)), _sources(changes, self.sources), len(hunks))


def _sources(changes: Sequence[Change], known: Sources) -> tuple[str, ...]:
    """The user's lines that changes come from."""
    nodes = [item for change in changes for item in (change.before, change.after) if isinstance(item, Node)]
    origins = [node.origin for node in nodes if node.origin.file]
    found = {o: line_of(known, o) for o in origins}
    texts = (
        o.place + (f" in {o.module}" if o.module else "") + (f"  {text}" if text else "") for o, text in found.items()
    )
    return tuple(dict.fromkeys(texts))
