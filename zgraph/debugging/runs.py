"""The numeric check of a run: whether its graphs compute what was captured, and after which pass they no longer do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zgraph.certify import float8
from zgraph.debugging.bisection import Search, Steps, Tell
from zgraph.debugging.check import NUM_MICRO_STEPS, examine, names_of, reference
from zgraph.debugging.known import Known, Reference
from zgraph.debugging.outcome import Failure
from zgraph.ir import DType, Graph, num_ranks
from zgraph.passes import Context
from zgraph.runfile.format import RunFile


@dataclass(frozen=True)
class Options:
    """How a run is checked.

    Args:
        every: check each graph, not the last one alone.
        seed: of the random inputs.
        micro_steps: how many run under no_sync at most.
        dtypes: check in the dtypes that the graphs say, too.
        tolerance: how much of its largest number an output may differ, in fp64.
        max_bytes: memory to use at most; by default half of what is free.
    """

    every: bool = False
    seed: int = 0
    micro_steps: int = NUM_MICRO_STEPS
    dtypes: bool = False
    tolerance: float | None = None
    max_bytes: int | None = None


@dataclass(frozen=True)
class Wrong:
    """The first graph of a run that does not compute what was captured.

    Args:
        graph: what it is called.
        step: the pass that made it, as the recipe writes it.
        failure: what is wrong.
        dtypes: whether it is so in real dtypes only.
    """

    graph: str
    step: str
    failure: Failure
    dtypes: bool = False


@dataclass(frozen=True)
class Checked:
    """Record of what was checked of a run.

    Args:
        graphs: what the graphs are called.
        programs: in which programs they ran, by their names.
        num_ranks: on how many simulated ranks.
        wrong: what is wrong; None where nothing is.
    """

    graphs: tuple[str, ...]
    programs: tuple[str, ...]
    num_ranks: int
    wrong: Wrong | None


def check_run(run: RunFile, options: Options | None = None, tell: Tell = lambda text: None) -> Checked:
    """Run the graphs of a run on simulated ranks, and compare them with the one that was captured.

    Args:
        run: the run.
        options: how.
        tell: is told what is done, for those who wait.

    Raises:
        BudgetError: it would take more memory.
        CheckError: the captured graph cannot be run here.
        VerifyError: it is not valid.
    """
    names, steps = run.names, [(step, graph) for step, graph, _ in run.steps]
    return check_graphs(names, steps, run.context, options, tell)


def check_graphs(
    names: Sequence[str],
    steps: Sequence[tuple[str, Graph]],
    context: Context,
    options: Options | None = None,
    tell: Tell = lambda text: None,
) -> Checked:
    """The same of graphs in memory.

    Args:
        names: what the graphs are called.
        steps: each graph with the pass that made it, what was captured first.
        context: what the passes knew.
        options: how to check.
        tell: is told what is done, for those who wait.
    """
    options = options or Options()
    return _Check(tuple(names), Steps(tuple(steps)), context, options, tell).run()


class _Check:
    def __init__(self, names: tuple[str, ...], steps: Steps, context: Context, options: Options, tell: Tell) -> None:
        self.names, self.steps, self.context, self.options, self.tell = names, steps, context, options, tell
        self.num_ranks = num_ranks(context.mesh)

    def run(self) -> Checked:
        programs: list[str] = []
        for dtype in (DType.f64, None) if self.options.dtypes else (DType.f64,):
            first = 0 if dtype else self.approximated
            steps = Steps(self.steps.graphs[first:])
            known = self.known(steps.graphs[0][1], dtype)
            programs += names_of(known, steps.graphs[-1][1], self.options.micro_steps)
            found = self.each(known, steps) if self.options.every else self.last(known, steps)
            if found is not None:
                at, failure = first + found[0], found[1]
                wrong = Wrong(self.names[at], self.steps.graphs[at][0], failure, dtypes=dtype is None)
                return Checked(self.looked_at, tuple(dict.fromkeys(programs)), self.num_ranks, wrong)
        return Checked(self.looked_at, tuple(dict.fromkeys(programs)), self.num_ranks, None)

    @property
    def looked_at(self) -> tuple[str, ...]:
        return self.names[1:] if self.options.every else self.names[-1:]

    @property
    def approximated(self) -> int:
        """The position of the last graph whose products are in float8 where those of the one before it are not.

        In fp64 these are the products that they approximate. In real dtypes they are as far from them as float8 is,
        which is what was asked for: graphs are compared with this one.
        """
        products = [frozenset(float8.products(graph)) for _, graph in self.steps.graphs]
        return max((at for at in range(1, len(products)) if products[at] - products[at - 1]), default=0)

    def known(self, graph: Graph, dtype: DType | None) -> Known:
        self.tell("running the captured graph" + ("" if dtype else " in its own dtypes"))
        return reference(
            graph,
            self.num_ranks,
            self.options.seed,
            self.context.hints,
            dtype,
            self.options.max_bytes,
            reduce_dtype=self.context.reduce_dtype,
        )

    def last(self, known: Known, steps: Steps) -> tuple[int, Failure] | None:
        """Whether the last graph is wrong; if it is, the first that is so in the same program."""
        tolerance = self.tolerance(known)
        return Search(known, steps, tolerance, self.options.micro_steps, tell=self.tell).first()

    def each(self, known: Known, steps: Steps) -> tuple[int, Failure] | None:
        """The first graph that is wrong."""
        before: Graph | None = steps.graphs[0][1]
        for at, (step, graph) in enumerate(steps.graphs):
            if not at or graph == before:
                continue
            before = graph
            self.tell(f"the graph after {step}")
            failure = examine(known, graph, tolerance=self.tolerance(known), micro_steps=self.options.micro_steps)
            if failure is not None:
                return at, failure
        return None

    def tolerance(self, known: Known) -> float | None:
        """Tolerance for a comparison: the user's where it is in fp64, else None."""
        return self.options.tolerance if isinstance(known, Reference) else None
