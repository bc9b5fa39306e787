"""The command `simulate`: the predicted step of a run, also with a slow rank, and the goodput of a job that fails."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zgraph.cli.app import AsJson, Load, app, console, print_json, read_run
from zgraph.errors import UsageError

if TYPE_CHECKING:
    from zgraph.cost.goodput import Goodput

UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)(ms|s|m|h|d)", re.ASCII)


def duration(text: str) -> float:
    """Seconds of a text such as `90s`, `5m` or `2.5h`. Raises UsageError if it is none."""
    found = _DURATION.fullmatch(text)
    if found is None:
        raise UsageError(f"{text[:40]!r} is no duration; write 90s, 5m, 2.5h or 1d")
    return float(found[1]) * UNITS[found[2]]


@app.command(name="simulate")
def simulate_run(
    file: Annotated[str, typer.Argument(help="A run file; - for standard input.")],
    straggler: Annotated[
        float, typer.Option(min=1.0, help="How many times as long the slowest rank computes as the others.")
    ] = 1.0,
    fail_every: Annotated[str, typer.Option(help="Mean time between failures of the job, as 3h.")] = "",
    checkpoint: Annotated[str, typer.Option(help="How long training stands still for a checkpoint.")] = "30s",
    restart: Annotated[str, typer.Option(help="From a failure until training goes on.")] = "5m",
    checkpoint_every: Annotated[
        str, typer.Option(help="Training between two checkpoints, as 20m.", show_default="the best")
    ] = "",
    load: Load = None,
    as_json: AsJson = False,
) -> None:
    """The predicted step: time, memory, and what computing waits for.

    `--straggler 1.2` makes one rank compute so much longer: all others wait for it in each collective. `--fail-every`
    says what is left of the time when failures, restarts, checkpoints and steps done twice are taken off.

    Example: `zgraph simulate run.zg --straggler 1.2 --fail-every 3h`
    """
    from zgraph.compiler.report import make_entry, mebibytes, step_summary
    from zgraph.cost import bytes_text, memory_interval, simulate

    run, name = read_run(file)
    plan, timeline = run.step(name)
    even_us = timeline.step_us
    if not math.isfinite(straggler):
        raise UsageError(f"--straggler must be a number from 1 on, not {straggler}")
    if straggler > 1:
        timeline = simulate(plan, run.context.costs, run.context.hints, straggler=straggler)
    entry = make_entry(plan, (), run.context, lambda: run, timeline)
    causes: dict[str, float] = defaultdict(float)
    starts = {n.name: n for n in entry.plan.graph.nodes}
    for stall in timeline.stalls:
        causes[f"{starts[stall.start].op} in the {stall.phase}"] += stall.us
    peak_bytes = entry.memory.peak.total_bytes + run.context.rest_bytes
    peak = memory_interval(peak_bytes, run.context.costs)
    kept = _goodput(timeline.step_us / 1e6, fail_every, checkpoint, restart, checkpoint_every)
    if as_json:
        found: dict[str, Any] = {
            "step_us": timeline.step_us,
            "step_low_us": entry.time.low,
            "step_high_us": entry.time.high,
            "lower_bound_us": entry.lower_bound_us,
            "gap": entry.gap,
            "busy_us": dict(timeline.busy_us),
            "exposed_us": timeline.exposed_us,
            "exposed_by": dict(causes),
            "peak_bytes": peak_bytes,
            "peak_low_bytes": peak.low,
            "peak_high_bytes": peak.high,
            "rest_bytes": run.context.rest_bytes,
        }
        if (space := entry.footprint) is not None:
            reserved = memory_interval(max(space.reserved_bytes, peak_bytes), run.context.costs)
            found |= {"reserved_bytes": reserved.value, "beside_bytes": space.beside_bytes}
            found |= {"reserved_low_bytes": reserved.low, "reserved_high_bytes": reserved.high}
        if straggler > 1:
            found["even_step_us"] = even_us
        if kept is not None:
            found["goodput"] = vars(kept)
        print_json(found)
        return
    console().print(step_summary(entry))
    if straggler > 1:
        longer = timeline.step_us / even_us - 1
        console().print(f"a rank that computes {straggler:g} times as long makes the step {longer:.1%} longer")
    for cause, us in sorted(causes.items(), key=lambda item: -item[1]):
        console().print(f"  exposed by {cause}: {us:,.1f} us")
    console().print(f"at rest {mebibytes(run.context.rest_bytes)}")
    if (space := entry.footprint) is not None:
        text = bytes_text(memory_interval(max(space.reserved_bytes, peak_bytes), run.context.costs))
        beside = mebibytes(space.beside_bytes)
        console().print(f"reserved by torch's allocator {text}; beside it {beside} of the driver's and NCCL's")
    if kept is not None:
        console().print(
            f"goodput {kept.useful:.1%} with a checkpoint after {kept.interval_s / 60:,.1f} minutes of training: "
            f"{kept.checkpoints:.1%} in checkpoints, {kept.restarts:.1%} in restarts, "
            f"{kept.lost:.1%} in steps done twice"
        )


def _goodput(step_s: float, fail_every: str, checkpoint: str, restart: str, checkpoint_every: str) -> Goodput | None:
    if not fail_every:
        return None
    from zgraph.cost.goodput import Failures, best_interval_s, goodput

    failures = Failures(duration(fail_every), duration(checkpoint), duration(restart))
    interval = duration(checkpoint_every) if checkpoint_every else best_interval_s(failures, step_s)
    return goodput(failures, interval)
