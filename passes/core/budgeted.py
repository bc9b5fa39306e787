"""Passes within a memory budget: a graph that does not fit is made anew; the smallest budget is found by trying.

The graph that `fit` chooses is not yet bucketed and scheduled, which may take more memory. Where the last graph is over
the budget, the passes run again, and `fit` and `keep` go by that much less. Where that is over as well, amounts for
them to go by are tried that are the same for every budget: the one of them that needs the least is there for all
budgets from its need on, which makes that the smallest budget that can, if none of the other ways fits into less by
then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from time import perf_counter  # the only clock: it times passes, which never see it

from zgraph.cost.memory import ALLOCATION_BYTES
from zgraph.errors import BudgetError
from zgraph.ir import Graph
from zgraph.passes.core.base import Context, Pass, rounded_down
from zgraph.passes.plan.make_plan import over_budget

_UNLIMITED = frozenset({"canonicalize", "fuse", "partition"})
"""Passes that look at no budget. Those that come first need not run again."""

_SHARES = (0.5, 0.65, 0.8, 0.9)
"""Amounts to go by, as parts of what the step needs where `fit` and `keep` go by nothing."""


@dataclass(frozen=True, slots=True)
class Ran:
    """One run of a pass: the graphs before and after it, and how long it took."""

    step: Pass
    before: Graph
    after: Graph
    seconds: float


def one_by_one(passes: Sequence[Pass], graph: Graph, context: Context) -> Iterator[Ran]:
    """Run passes, one after the other."""
    for step in passes:
        began = perf_counter()
        after = step.run(graph, context)
        yield Ran(step, graph, after, perf_counter() - began)
        graph = after


@dataclass(frozen=True)
class Attempt:
    """The passes that ran in one attempt, and the error that ended it, if one did."""

    ran: tuple[Ran, ...]
    error: Exception | None = None


@dataclass(frozen=True)
class Need:
    """Memory that a step needs when `fit` and `keep` aim at `fit_bytes`, and where in the step it needs that."""

    num_bytes: int
    fit_bytes: int
    where: str


class Budgeted:
    """Runs passes within a memory budget.

    Args:
        passes: in order.
        graph: what they are given.
        context: what they know, with a budget.
    """

    def __init__(self, passes: Sequence[Pass], graph: Graph, context: Context) -> None:
        assert context.memory_budget is not None
        self.graph, self.context, self.budget = graph, context, context.memory_budget
        first = tuple(takewhile(lambda step: step.name in _UNLIMITED, passes))
        self.first, self.others = first, tuple(passes[len(first) :])

    def run(self) -> Iterator[Ran]:
        """Run the passes so that the step fits, and yield each run.

        Raises:
            BudgetError: nothing fits; the message has the smallest budget that can hold the step.
        """
        plain = self.attempt(self.budget)
        error = _refusal(plain)
        found = plain if error is None else self.again(error)
        yield from (found or plain).ran
        if found is None:
            least = self.least
            raise over_budget(self.context, least.num_bytes - self.context.rest_bytes, least.where)
        if found.error is not None:
            raise found.error

    def again(self, error: BudgetError) -> Attempt | None:
        """An attempt that fits, where `fit` and `keep` must aim at less than the budget; None where nothing fits."""
        fit_bytes = self.lower(rounded_down(self.budget - self.context.rest_bytes), error)
        if fit_bytes is not None and _refusal(found := self.attempt(self.budget, fit_bytes)) is None:
            return found
        return self.attempt(self.budget, self.least.fit_bytes) if self.least.num_bytes <= self.budget else None

    def lower(self, limit: int, error: BudgetError) -> int | None:
        """The limit to try after one that ended in an error: lower by as many bytes as the step was over it."""
        found = 2 * limit - (error.needed_bytes - self.context.rest_bytes)
        return found if 0 < found < limit else None

    @cached_property
    def begun(self) -> Attempt:
        """The attempt with the first passes alone, which is the same for all budgets."""
        return _attempt(self.first, self.graph, self.context)

    def attempt(self, budget: int, fit_bytes: int | None = None) -> Attempt:
        """Run the passes within a budget; `fit` and `keep` aim at `fit_bytes`, or at all of the budget if None."""
        if self.begun.error is not None:
            return self.begun
        graph = self.begun.ran[-1].after if self.begun.ran else self.graph
        made = _attempt(self.others, graph, replace(self.context, memory_budget=budget, fit_bytes=fit_bytes))
        return Attempt(self.begun.ran + made.ran, made.error)

    @cached_property
    def least(self) -> Need:
        """The least that the step was found to need; a budget with a byte less ends in an error."""
        rest, start = self.context.rest_bytes, self.need(0)
        peak_bytes = start.num_bytes - rest
        best = min((start, *(self.need(int(share * peak_bytes)) for share in _SHARES)), key=lambda n: n.num_bytes)
        stride = 0
        while best.num_bytes > rest + self.context.update_bytes:
            found = self.below(rounded_down(best.num_bytes - 1 - rest) - stride)
            if found.num_bytes < best.num_bytes:
                best, stride = found, max(2 * stride, ALLOCATION_BYTES)
            elif stride:
                stride = 0
            else:
                break
        return best

    def below(self, limit: int) -> Need:
        """The least that is needed within a limit, in the ways in which a budget is first tried."""
        found = self.need(limit)
        fit_bytes = self.lower(limit, BudgetError("", found.num_bytes))
        return found if fit_bytes is None else min(found, self.need(fit_bytes), key=lambda n: n.num_bytes)

    def need(self, fit_bytes: int) -> Need:
        """The memory that the step needs when `fit` and `keep` aim at `fit_bytes`."""
        error = _refusal(self.attempt(self.context.rest_bytes - 1, fit_bytes))
        assert error is not None, "no step takes less than nothing"
        return Need(error.needed_bytes, fit_bytes, error.where)


def _refusal(attempt: Attempt) -> BudgetError | None:
    """The error of an attempt that does not fit."""
    return attempt.error if isinstance(attempt.error, BudgetError) else None


def _attempt(passes: Sequence[Pass], graph: Graph, context: Context) -> Attempt:
    ran: list[Ran] = []
    try:
        ran.extend(one_by_one(passes, graph, context))
    except Exception as error:  # whatever it is: it is raised when what came before it has been told
        return Attempt(tuple(ran), error)
    return Attempt(tuple(ran))
