"""Layouts on emulated hosts: what "auto" picks beside the pure ones, and experts over ranks beside stage 3.

Hosts have two ranks each, and a link of the given rate between them; within a host nothing is limited.

python -m benchmarks.layouts --rate 1gbit --json layouts.json
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from benchmarks import models
from benchmarks.campaign import Campaign, Order
from benchmarks.errors import BenchmarkError
from benchmarks.hosts import Host, emulated, link_bytes_per_s
from benchmarks.job import Job, Measure
from benchmarks.results import Record, write
from benchmarks.systems import BY_NAME
from benchmarks.systems.layouts import LINK, PLAN, RANKS_PER_HOST, planned

AUTO = "layout: auto"
TASKS = {
    "auto": ("llama-8m", ("layout: stage 3", "layout: tensor parallel", "layout: hsdp", AUTO)),
    "experts": ("moe-small", ("layout: stage 3", "layout: experts")),
}
"""Layouts that are compared, and on which model."""

TOLERANCE = 1.05
"""How much slower than the best layout the one that "auto" picks may be."""


@dataclass(frozen=True)
class Row:
    """One layout.

    Args:
        task, model, layout: which.
        error: why it was not measured; None where it was.
        step_s: the median of the rounds' medians.
        tokens_per_s: of all ranks; those that share a batch train on it once.
        loss: of the last step, a mean over ranks.
        words: how the layout was chosen.
    """

    task: str
    model: str
    layout: str
    error: str | None
    step_s: float = 0.0
    tokens_per_s: float = 0.0
    loss: float = 0.0
    words: str = ""

    @property
    def line(self) -> str:
        name = f"{self.model:10} {self.layout:24}"
        if self.error is not None:
            return f"{name} {self.error}"
        return f"{name} {self.step_s:8.3f} s a step {self.tokens_per_s:9,.0f} tokens/s   loss {self.loss:.3f}"


@contextmanager
def shared(num_hosts: int, rate: str) -> Iterator[list[Host]]:
    """Hosts with two ranks on each: of what leaves an interface, no rank can tell its own."""
    with emulated(num_hosts, rate) as hosts:
        yield [replace(host, counts_bytes=False) for host in hosts for _ in range(RANKS_PER_HOST)]


def row(task: str, record: Record) -> Row:
    """Summary of the record of a layout."""
    model, layout = TASKS[task][0], record.system.name.removeprefix("layout: ")
    if not record.rounds:
        return Row(task, model, layout, record.errors.get(Measure.TIME, "not measured"))
    last = record.rounds[-1]
    step_s, batches = median(record.round_medians_s), last[0].num_batches or len(last)
    tokens = batches * models.preset(model).num_tokens
    loss = sum(report.losses[-1] for report in last) / len(last)
    return Row(task, model, layout, None, step_s, tokens / step_s, loss, last[0].words)


def verdict(task: str, rows: Sequence[Row]) -> str:
    """How the last layout of a task stands beside the others, in words."""
    last, others = rows[-1], [one for one in rows[:-1] if one.error is None]
    if last.error is not None or not others:
        return f"{task}: not compared"
    best = max(others, key=lambda one: one.tokens_per_s)
    ratio = best.tokens_per_s / last.tokens_per_s
    held = "" if task != "auto" else " (as asked)" if ratio <= TOLERANCE else f" (more than {TOLERANCE:.2f}, as asked)"
    return f"{task}: {last.layout} takes {ratio:.2f} of the time of the best other, {best.layout}, for a token{held}"


def main(
    rate: Annotated[str, typer.Option(help="Rate of the links between hosts, as tc writes it.")] = "1gbit",
    hosts: Annotated[int, typer.Option(min=2, help="Emulated hosts, two ranks on each; needs root.")] = 2,
    tasks: Annotated[str, typer.Option(help="Of auto and experts, with commas.")] = "auto,experts",
    steps: Annotated[int, typer.Option(min=1, help="Measured steps in each round.")] = 4,
    warmup: Annotated[int, typer.Option(min=1, help="Steps before them, in each round.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Fresh launches of every layout.")] = 2,
    timeout: Annotated[float, typer.Option(help="Seconds that one launch may take.")] = 240.0,
    logs: Annotated[Path | None, typer.Option(help="Folder to keep each rank's output in.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the results to.")] = None,
) -> None:
    """Measure training steps of layouts on emulated hosts."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # a killed run, too, ends its ranks and its hosts
    say = partial(typer.echo, err=True)
    found: list[Row] = []
    options = {"rate": rate, "hosts": hosts, "ranks_per_host": RANKS_PER_HOST, "steps": steps, "rounds": rounds}
    try:
        os.environ[LINK] = str(link_bytes_per_s(rate))
        with TemporaryDirectory() as folder, shared(hosts, rate) as places:
            for task in tasks.split(","):
                model, names = TASKS[task.strip()]
                if AUTO in names:
                    began, path = time.perf_counter(), Path(folder) / "plan"
                    path.write_bytes(pickle.dumps(planned(model, link_bytes_per_s(rate), len(places))))
                    os.environ[PLAN] = str(path)
                    say(f"planned in {time.perf_counter() - began:.0f} s")
                job = Job("", model, Measure.TIME, len(places), num_warmup=warmup, num_steps=steps)
                chosen = [BY_NAME[name] for name in names]
                campaign = Campaign(job, chosen, rounds, Order.INTERLEAVED, timeout, logs, say)
                rows = [row(task.strip(), record) for record in campaign.measure_steps(places, ())]
                found += rows
                for one in rows:
                    print(one.line, *([f"    {one.words}"] if one.words else []), sep="\n", flush=True)
                print(verdict(task.strip(), rows), flush=True)
                write(json_file, options=options, rows=[asdict(one) for one in found])
    except KeyError as error:
        say(f"--tasks: there is no {error}; it is of {', '.join(TASKS)}")
        raise typer.Exit(1) from error
    except BenchmarkError as error:
        say(f"{type(error).__name__}: {error}")
        raise typer.Exit(1) from error


if __name__ == "__main__":
    typer.run(main)
