"""Training steps with Muon beside AdamW's, on two emulated hosts: python -m benchmarks.muon --json muon.json

The same Llama, 8.5 M parameters at stage 3, with batches of two sizes: Newton-Schulz costs the same for any batch,
so what Muon adds to a step falls with the tokens of it.
"""

from __future__ import annotations

import signal
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks import models
from benchmarks.campaign import Campaign, Order
from benchmarks.errors import BenchmarkError
from benchmarks.hosts import Host, emulated, loopback
from benchmarks.job import Job, Measure
from benchmarks.results import Record, rows, write
from benchmarks.systems.optimizers import OPTIMIZERS
from zgraph.optim.newton_schulz import flop
from zgraph.optim.roles import hidden_matrices
from zgraph.optim.shares import owners

MODELS = "llama-8m,llama-8m-2k"
NS_STEPS = 5


@dataclass(frozen=True)
class Measured:
    """One batch size.

    num_tokens: of a step, on one rank.
    adamw_s, muon_s: medians of the rounds' medians.
    ratio: Muon's step over AdamW's, the median over rounds, each compared with itself.
    model_gflop: of forward and backward on one rank, six for each parameter and token.
    newton_schulz_gflop: of the rank that owns most.
    adamw_sent_bytes, muon_sent_bytes: of one rank in one step; None where nothing counts them.
    """

    model: str
    num_tokens: int
    adamw_s: float
    muon_s: float
    ratio: float
    model_gflop: float
    newton_schulz_gflop: float
    adamw_sent_bytes: float | None
    muon_sent_bytes: float | None
    rounds_s: dict[str, list[float]]


def measured(name: str, campaign: Campaign, hosts: list[Host]) -> Measured:
    """Steps of both optimizers in turns.

    Raises:
        BenchmarkError: one of them failed.
    """
    records = campaign.measure_steps(hosts, [])
    for record in records:
        if record.errors:
            raise BenchmarkError(f"{record.system.name}: {record.errors[Measure.TIME]}", "Run it with --logs")
    adamw, muon = rows(records, len(hosts))
    assert adamw.step_s is not None
    assert muon.step_s is not None
    num_tokens = models.preset(name).num_tokens
    model_flop, newton_schulz = _work(name, len(hosts))
    return Measured(
        name,
        num_tokens,
        adamw.step_s,
        muon.step_s,
        _ratio(*records),
        model_flop * num_tokens / 1e9,
        newton_schulz / 1e9,
        adamw.sent_bytes,
        muon.sent_bytes,
        {r.system.name: r.round_medians_s for r in records},
    )


def _ratio(adamw: Record, muon: Record) -> float:
    return median(b / a for a, b in zip(adamw.round_medians_s, muon.round_medians_s, strict=True))


def _work(name: str, num_ranks: int) -> tuple[int, int]:
    """FLOP a token of the model, and of Newton-Schulz for the rank that owns most."""
    model: nn.Module = models.build(name, torch.device("cpu"))
    matrices = hidden_matrices(model)
    works = [flop(p.shape[0], p.shape[1:].numel(), NS_STEPS) for p in model.parameters() if id(p) in matrices]
    most = max(sum(works[n] for n in share) for share in owners(works, num_ranks))
    return 6 * sum(p.numel() for p in model.parameters()), most


def main(
    names: Annotated[str, typer.Option("--models", help=f"Of {', '.join(models.NAMES)}.")] = MODELS,
    world: Annotated[int, typer.Option(min=2, help="Ranks, one on each host.")] = 2,
    rate: Annotated[str, typer.Option(help="Link rate of emulated hosts, as root; '' takes loopback.")] = "1gbit",
    steps: Annotated[int, typer.Option(min=1, help="Measured steps in each round.")] = 3,
    warmup: Annotated[int, typer.Option(min=1, help="Steps before them, in each round.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Fresh launches of each.")] = 3,
    timeout: Annotated[float, typer.Option(help="Seconds that one launch may take.")] = 600.0,
    logs: Annotated[Path | None, typer.Option(help="Folder to keep each rank's output in.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the results to.")] = None,
) -> None:
    """Measure steps with both optimizers in turns, and print a table."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # a killed run, too, ends its ranks and its hosts
    say = partial(typer.echo, err=True)
    title = f"{world} ranks, {f'emulated hosts at {rate}' if rate else 'loopback'}, one step"
    table = Table("tokens", title=title, title_justify="left")
    for column in ("AdamW s", "Muon s", "ratio", "model GFLOP", "NS GFLOP", "sent MB", "Muon MB"):
        table.add_column(column, justify="right")
    found: list[Measured] = []
    options = {"world_size": world, "rate": rate, "num_steps": steps, "num_warmup": warmup, "num_rounds": rounds}
    try:
        with emulated(world, rate) if rate else loopback(world) as hosts:
            for name in names.split(","):
                models.preset(name)
                job = Job("", name, Measure.TIME, world, num_warmup=warmup, num_steps=steps)
                campaign = Campaign(job, OPTIMIZERS, rounds, Order.INTERLEAVED, timeout, logs, say)
                row = measured(name, campaign, hosts)
                found.append(row)
                sent = (f"{b / 1e6:.1f}" if b is not None else "" for b in (row.adamw_sent_bytes, row.muon_sent_bytes))
                table.add_row(
                    f"{row.num_tokens:,}",
                    f"{row.adamw_s:.2f}",
                    f"{row.muon_s:.2f}",
                    f"{row.ratio:.2f}",
                    f"{row.model_gflop:.0f}",
                    f"{row.newton_schulz_gflop:.0f}",
                    *sent,
                )
                write(json_file, options=options, rows=[asdict(row) for row in found])
    except BenchmarkError as error:
        say(f"{type(error).__name__}: {error}")
        raise typer.Exit(1) from error
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
