"""Training steps of zgraph and its baselines, on the same model, data and seeds, in one run.

python -m benchmarks.steps --hosts emulated --rate 1gbit --json results.json
"""

from __future__ import annotations

import signal
import sys
from dataclasses import asdict
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import models
from benchmarks.campaign import Campaign, Order
from benchmarks.errors import BenchmarkError
from benchmarks.hosts import emulated, link_bytes_per_s, loopback
from benchmarks.job import Job, Measure
from benchmarks.results import rows, write
from benchmarks.systems import select
from benchmarks.table import steps_table

DEFAULT_RATE = "1gbit"
PIPE_WIDTH = 225
"""Columns of the table where there is no terminal to ask."""


class HostKind(StrEnum):
    LOOPBACK = "loopback"
    EMULATED = "emulated"


def main(
    world: Annotated[int, typer.Option(min=1, help="Ranks; with emulated hosts, one on each host.")] = 2,
    hosts: Annotated[HostKind, typer.Option(help="Emulated needs root.")] = HostKind.LOOPBACK,
    rate: Annotated[list[str] | None, typer.Option(help="Link rate of emulated hosts; may repeat.")] = None,
    model: Annotated[str, typer.Option(help=", ".join(models.NAMES))] = "llama-30m",
    systems: Annotated[str, typer.Option(help="Parts of names: 'zgraph,DDP'. All if empty.")] = "",
    codes: Annotated[bool, typer.Option("--codes", help="Also systems that send codes, which approximate.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Measured steps in each round.")] = 5,
    warmup: Annotated[int, typer.Option(min=1, help="Steps before them, in each round.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Fresh launches of every system.")] = 3,
    order: Annotated[Order, typer.Option(help="The order of the launches.")] = Order.INTERLEAVED,
    with_memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Count bytes live too.")] = True,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    timeout: Annotated[float, typer.Option(help="Seconds that one launch may take.")] = 300.0,
    logs: Annotated[Path | None, typer.Option(help="Folder to keep each rank's output in.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the results to.")] = None,
) -> None:
    """Measure training steps of zgraph and its baselines, and print a table."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # a killed run, too, ends its ranks and its hosts
    say = partial(typer.echo, err=True)
    options = {
        "model": model,
        "world_size": world,
        "num_steps": steps,
        "num_warmup": warmup,
        "num_rounds": rounds,
        "order": order,
        "device": device,
    }
    batch = f"batch {models.BATCH_SIZE} x {models.SEQUENCE_LENGTH} a rank"
    results = []
    try:
        models.preset(model)
        chosen = select([word.strip() for word in systems.split(",") if word.strip()], with_codes=codes)
        job = Job("", model, Measure.TIME, world, num_warmup=warmup, num_steps=steps, device=device)
        campaign = Campaign(job, chosen, rounds, order, timeout, logs, say)
        memory = campaign.measure_memory() if with_memory else []
        for link in [None] if hosts is HostKind.LOOPBACK else rate or [DEFAULT_RATE]:
            with loopback(world) if link is None else emulated(world, link) as places:
                limit = None if link is None else link_bytes_per_s(link)
                table = rows(campaign.measure_steps(places, memory), world, limit)
            where = "loopback" if link is None else f"emulated hosts at {link}"
            title = f"{model}, {world} ranks on {where}, {batch}, fp32, {rounds} rounds of {steps} steps"
            Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(steps_table(title, table))
            results.append({"hosts": hosts, "rate": link, "rows": [asdict(row) for row in table]})
            write(json_file, options=options, results=results)
    except BenchmarkError as error:
        say(f"{type(error).__name__}: {error}")
        raise typer.Exit(1) from error


if __name__ == "__main__":
    typer.run(main)
