"""The result of a run, in figures and in plain words. What the run does not hold is left out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from zgraph.cost import Timeline, bytes_text, memory_interval, time_interval, time_text, traffic
from zgraph.cost.rest import at_rest
from zgraph.ir import Graph, Mesh
from zgraph.passes import make_plan
from zgraph.passes.schedule import step_bound_us
from zgraph.runfile.format import RunFile, has_backward


@dataclass(frozen=True)
class Figures:
    """The predicted step in figures, of one rank.

    Args:
        step_us, bound_us: how long it takes, and what no order of it can beat.
        communication_us, exposed_us: how long the network is busy, and for how much of that computing waits.
        sent_bytes: bytes that go over the network.
        peak_bytes: most bytes alive, with what lies at rest.
    """

    step_us: float
    bound_us: float
    communication_us: float
    exposed_us: float
    sent_bytes: int
    peak_bytes: int


def figures(run: RunFile) -> Figures | None:
    """The figures of a run's last graph; None where it cannot be planned."""
    timeline = run.timeline
    if timeline is None:
        return None
    graph = run.graph()
    return Figures(
        step_us=timeline.step_us,
        bound_us=step_bound_us(graph, run.context, timeline),
        communication_us=timeline.busy_us.get("comm", 0.0),
        exposed_us=_exposed_us(timeline),
        sent_bytes=sum(t.sent_bytes for t in traffic(make_plan(graph, only_step=True))),
        peak_bytes=timeline.memory.peak.total_bytes + run.context.rest_bytes,
    )


def _exposed_us(timeline: Timeline) -> float:
    """Time that computing waits for the network, without copies from and to the host."""
    sent = {span.node for span in timeline.spans if span.lane == "comm"}
    return sum(stall.us for stall in timeline.stalls if stall.start in sent)


def unsharded_bytes(run: RunFile) -> int | None:
    """Bytes that a rank would hold between steps if each held all of the parameters and the optimizer's states.

    It takes AdamW's two moments for granted. None where what the run says to lie at rest is not what follows from
    that, as with another optimizer, and where there is nothing to train.
    """
    graph = run.graph()
    if not has_backward(graph) or _resting(graph) != run.context.rest_bytes:
        return None
    alone: Mesh = tuple(replace(axis, size=1) for axis in graph.mesh)
    return _resting(replace(graph, mesh=alone, inputs=tuple(replace(i, offload="") for i in graph.inputs)))


def _resting(graph: Graph) -> int:
    found = at_rest(graph)
    return found["masters"] + found["optimizer"] + found["buffers"]


def headline(run: RunFile) -> list[str]:
    """Sentences: stage and ranks; what sharding saves; the peak; what communication is exposed; the lower bound."""
    found = figures(run)
    return [_subject(run), *_rest(run), *(_step(run, found) if found else ())]


def _subject(run: RunFile) -> str:
    ranks = " x ".join(str(axis.size) for axis in run.context.mesh) or "1"
    stages = sorted({p.stage for p in run.graph().params if p.stage is not None})
    at = f" at ZeRO stage {' and '.join(map(str, stages))}" if stages else ""
    on = f"{ranks} rank{'s' * (ranks != '1')} of {run.context.costs.hardware.name}"
    return f"{run.manifest.provenance.model}{at} on {on}."


def _rest(run: RunFile) -> Iterator[str]:
    here, whole = run.context.rest_bytes, unsharded_bytes(run)
    if whole is not None and whole > here:
        yield (
            f"Each rank holds {size(here)} of parameters and optimizer states; "
            f"unsharded, each would hold {size(whole)}."
        )


def _step(run: RunFile, found: Figures) -> Iterator[str]:
    budget = run.context.memory_budget
    costs = run.context.costs
    peak = bytes_text(memory_interval(found.peak_bytes, costs))
    yield f"The peak is {peak}{f' of a budget of {size(budget)}' if budget else ''}."
    if found.communication_us:
        hidden_us = max(0.0, found.communication_us - found.exposed_us)
        yield (
            f"Of {duration(found.communication_us)} of communication, {duration(hidden_us)} is hidden behind computing "
            f"and {duration(found.exposed_us)} is exposed."
        )
    what = "training step" if has_backward(run.graph()) else "forward"
    gap = (
        f", {100 * max(0.0, found.step_us / found.bound_us - 1):.1f} % above its lower bound" if found.bound_us else ""
    )
    step = time_interval(found.step_us, run.graph(), costs, run.context.hints)
    yield f"The {what} is predicted to take {time_text(step)}{gap}."


def size(num_bytes: float) -> str:
    """Bytes in the largest unit that they fill."""
    for unit, exponent in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if num_bytes >= 2**exponent:
            return f"{num_bytes / 2**exponent:,.1f} {unit}"
    return f"{num_bytes:,.0f} B"


def duration(us: float) -> str:
    """Microseconds in the largest unit that they fill."""
    for unit, factor in (("s", 1e6), ("ms", 1e3)):
        if us >= factor:
            return f"{us / factor:,.2f} {unit}"
    return f"{us:,.1f} µs"
