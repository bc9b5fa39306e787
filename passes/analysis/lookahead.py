"""Predicts a graph whose reshards are not lowered yet, for passes that choose between several such graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from zgraph.cost import MemoryCurve
from zgraph.ir import Graph
from zgraph.passes.all_gather import AllGather
from zgraph.passes.all_reduce import AllReduce
from zgraph.passes.analysis.timetable import evaluate, first_use_order, latest_first_order
from zgraph.passes.broadcast import Broadcast
from zgraph.passes.core.base import Context, Pass
from zgraph.passes.exchange import Exchange
from zgraph.passes.host_copies import HostCopies
from zgraph.passes.plan.make_plan import memory_of
from zgraph.passes.reduce_scatter import ReduceScatter
from zgraph.passes.release import Release
from zgraph.passes.schedule import LoweredStep

LOWERING = (Exchange(), Broadcast(), AllGather(), ReduceScatter(), AllReduce(), HostCopies())
"""Zgraph's own, for what the pipeline at hand leaves: nothing, as a rule."""


def lowered(graph: Graph, context: Context) -> LoweredStep:
    """The graph with every reshard lowered, as a scheduling problem."""
    return LoweredStep(Release().run(_lower(graph, context), context), context)


def peak_bytes(graph: Graph, context: Context) -> int:
    """Bytes alive at the peak of a step whose collectives all run where they are needed."""
    return step_memory(graph, context).peak.total_bytes


def step_memory(graph: Graph, context: Context) -> MemoryCurve:
    """Bytes alive over a step whose collectives all run where they are needed."""
    return memory_of(_lower(graph, context), context.hints)


def _lower(graph: Graph, context: Context) -> Graph:
    for lowering in (*context.lowering, *LOWERING):
        if all(node.op != "reshard" for node in graph.nodes):
            break
        graph = lowering.run(graph, context)
    return graph


def makespan_us(graph: Graph, context: Context, memory: MemoryCurve | None = None, num_ahead: int = 2) -> float:
    """The time of a step with the better of the two plain orders of its collectives.

    Args:
        graph: not lowered yet.
        context: costs and sizes.
        memory: what `step_memory` says of it, if that is known.
        num_ahead: of how many collectives there is room for results beside what is used, where there is no budget.
    """
    step = lowered(graph, context)
    problem = step.problem(step.headroom_beside(memory or step_memory(graph, context), num_ahead))
    orders = (first_use_order(problem), latest_first_order(problem))
    return min(t.makespan_us for t in (evaluate(problem, order) for order in orders) if t is not None)


def times_with(step: Pass, option: str, texts: Sequence[str], graph: Graph, context: Context) -> dict[str, float]:
    """Predicted microseconds of a step, with a lowering pass at each of these values of an option, and without it.

    Args:
        step: the pass.
        option: which of its options has the values.
        texts: the values; the empty text stands for none of it.
        graph: before the pass.
        context: of the pass, whose lowering is taken without passes of its kind.
    """
    others = tuple(other for other in context.lowering if not isinstance(other, type(step)))
    context = replace(context, lowering=others)
    found = {"": makespan_us(graph, context)}
    for text in texts:
        given: dict[str, Any] = {option: text}
        found[text] = makespan_us(replace(step, **given).run(graph, context), context)
    return found
