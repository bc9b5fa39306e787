"""Overhead of the compiler where it has nothing to do: eager against `zgraph.compile(stage=0)` in one process.

    python -m benchmarks.overhead --json overhead.json

No process group, no sharding: both train the same model on the same batches. Their steps alternate, so that
whatever else the machine does hits both equally.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import models
from benchmarks.errors import BenchmarkError
from benchmarks.results import write
from benchmarks.systems import BY_NAME, Step, System

EAGER, COMPILED = BY_NAME["plain eager"], BY_NAME["zgraph stage 0"]


@dataclass(frozen=True)
class Overhead:
    """Step times of one model, in seconds, each list in the order of the steps.

    ratio: median of compiled over median of eager; below 1 the compiled model is faster.
    ratio_low, ratio_high: quartiles of the ratio between one step and its counterpart.
    """

    model: str
    eager_s: tuple[float, ...]
    compiled_s: tuple[float, ...]
    eager_loss: float
    compiled_loss: float
    ratio: float
    ratio_low: float
    ratio_high: float


def measure(model: str, num_warmup: int, num_steps: int, device: torch.device) -> Overhead:
    """Train one model both ways, step by step in turns."""
    eager, compiled = (_prepare(system, model, device) for system in (EAGER, COMPILED))
    seconds: tuple[list[float], list[float]] = ([], [])
    losses: list[float] = [0.0, 0.0]
    for index in range(num_warmup + num_steps):
        tokens = models.batch(model, step=index, rank=0, device=device)
        for which, step in enumerate((eager, compiled)):
            elapsed_s, loss = _timed(step, tokens)
            losses[which] = float(loss)
            if index >= num_warmup:
                seconds[which].append(elapsed_s)
    pairs = [slow / fast for fast, slow in zip(*seconds, strict=True)]
    low, _, high = quantiles(pairs, n=4, method="inclusive")
    ratio = median(seconds[1]) / median(seconds[0])
    return Overhead(model, tuple(seconds[0]), tuple(seconds[1]), losses[0], losses[1], ratio, low, high)


def overhead_table(results: list[Overhead]) -> Table:
    table = Table("model", title="eager against zgraph.compile(stage=0), one process", title_justify="left")
    for column in ("eager s", "compiled s", "ratio", "quartiles", "eager loss", "compiled loss"):
        table.add_column(column, justify="right")
    for result in results:
        table.add_row(
            result.model,
            f"{median(result.eager_s):.4f}",
            f"{median(result.compiled_s):.4f}",
            f"{result.ratio:.3f}",
            f"{result.ratio_low:.3f} to {result.ratio_high:.3f}",
            f"{result.eager_loss:.6f}",
            f"{result.compiled_loss:.6f}",
        )
    return table


def main(
    model: Annotated[list[str] | None, typer.Option(help="Preset; may repeat. All if not given.")] = None,
    steps: Annotated[int, typer.Option(min=2, help="Measured steps of each.")] = 20,
    warmup: Annotated[int, typer.Option(min=1, help="Steps before them.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Threads torch may use.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the results to.")] = None,
) -> None:
    """Measure what zgraph costs in one process, beside eager PyTorch."""
    torch.set_num_threads(threads)
    names = model or list(models.NAMES)
    try:
        results = [measure(name, warmup, steps, torch.device(device)) for name in names]
    except BenchmarkError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(1) from error
    Console(width=None if sys.stdout.isatty() else 120).print(overhead_table(results))
    options = {"num_steps": steps, "num_warmup": warmup, "num_threads": threads, "device": device}
    write(json_file, options=options, results=[asdict(result) for result in results])


def _prepare(system: System, model: str, device: torch.device) -> Step:
    system.require()
    return system.prepare(models.build(model, device), device)


def _timed(step: Step, tokens: Tensor) -> tuple[float, Tensor]:
    """Seconds one step took, and its loss."""
    start = time.perf_counter()
    loss = step(tokens)
    if loss.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, loss


if __name__ == "__main__":
    typer.run(main)
