"""One step of an optimizer over many small shards: python -m benchmarks.optimizer --json optimizer.json

Every rank holds its shards of a model of small layers, as `zgraph.compile(stage=3)` leaves them: DTensors over one flat
buffer. zgraph's AdamW updates the buffer, torch's goes through the parameters. Gradients are there as a backward leaves
them, each a tensor of its own, so that what zgraph copies side by side is part of its time. The optimizers take turns,
each with a separate model that starts the same; a step ends when the slowest rank has.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.multiprocessing
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.tensor import DTensor

import zgraph
from benchmarks.results import write
from zgraph.optim import AdamW

BASELINE = "torch, foreach"

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "zgraph": lambda parameters: AdamW(parameters, lr=1e-3),
    BASELINE: lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, foreach=True),
    "torch, fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
}


@dataclass(frozen=True)
class Options:
    """Sizes of a measurement, and its number of ranks."""

    num_ranks: int
    num_parameters: int
    width: int
    num_steps: int
    num_warmup: int


@dataclass(frozen=True)
class Timed:
    """Seconds of a step: median and quartiles; the median over that of torch's foreach.

    error: the largest distance of a number from that optimizer's, in the end.
    """

    optimizer: str
    step_s: float
    step_low_s: float
    step_high_s: float
    ratio: float
    error: float


def rank_main(rank: int, options: Options, folder: str) -> None:
    """One rank: every optimizer's steps in turns; the first rank writes the times of the slowest."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", options.num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=options.num_ranks)
    models = {name: model(options) for name in OPTIMIZERS}
    optimizers = {name: OPTIMIZERS[name](models[name].parameters()) for name in OPTIMIZERS}
    seconds: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
    for step in range(options.num_warmup + options.num_steps):
        for name, optimizer in optimizers.items():
            give_gradients(models[name], step)
            dist.barrier()
            began = time.perf_counter()
            optimizer.step()
            slowest = torch.tensor(time.perf_counter() - began)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            seconds[name].append(slowest.item())
    errors = {name: error(models[name], models[BASELINE]) for name in OPTIMIZERS}
    if rank == 0:
        Path(folder, "times.json").write_text(json.dumps({"seconds": seconds, "errors": errors}))
    dist.destroy_process_group()


def model(options: Options) -> nn.Module:
    """Layers of a matrix and a bias each, sharded."""
    torch.manual_seed(0)
    layers = [nn.Linear(options.width, options.width) for _ in range(options.num_parameters // 2)]
    return zgraph.compile(nn.Sequential(*layers), stage=3)


def give_gradients(sharded: nn.Module, step: int) -> None:
    dice = torch.Generator().manual_seed(step)
    for parameter in sharded.parameters():
        assert isinstance(parameter, DTensor)
        local = torch.randn(parameter.to_local().shape, generator=dice)
        parameter.grad = DTensor.from_local(local, parameter.device_mesh, parameter.placements, run_check=False)


def error(one: nn.Module, other: nn.Module) -> float:
    """The largest distance of a number on this rank."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a.detach().to_local() - b.detach().to_local()).abs().max()) for a, b in pairs)


def measure(options: Options) -> list[Timed]:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(rank_main, (options, folder), options.num_ranks)
        found = json.loads(Path(folder, "times.json").read_text())
    seconds = {name: times[options.num_warmup :] for name, times in found["seconds"].items()}
    baseline_s = median(seconds[BASELINE])
    rows = []
    for name, times in seconds.items():
        low, middle, high = quantiles(times, n=4, method="inclusive")
        rows.append(Timed(name, middle, low, high, middle / baseline_s, found["errors"][name]))
    return rows


def main(
    num_ranks: Annotated[int, typer.Option(min=2, help="Ranks, with one thread each.")] = 2,
    num_parameters: Annotated[int, typer.Option(min=2, help="Half of them matrices, half biases.")] = 1000,
    width: Annotated[int, typer.Option(min=1, help="Rows and columns of a matrix.")] = 64,
    num_steps: Annotated[int, typer.Option("--steps", min=2, help="Measured steps of each.")] = 20,
    num_warmup: Annotated[int, typer.Option("--warmup", min=1, help="Steps before them.")] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the results to.")] = None,
) -> None:
    """Time steps of all optimizers in turns, and print the medians."""
    options = Options(num_ranks, num_parameters, width, num_steps, num_warmup)
    rows = measure(options)
    title = f"{num_parameters} parameters on {num_ranks} ranks, one optimizer step"
    table = Table("AdamW", title=title, title_justify="left")
    for column in ("step ms", "quartiles", "of foreach", "largest difference"):
        table.add_column(column, justify="right")
    for row in rows:
        quartiles = f"{1e3 * row.step_low_s:.2f} to {1e3 * row.step_high_s:.2f}"
        table.add_row(row.optimizer, f"{1e3 * row.step_s:.2f}", quartiles, f"{row.ratio:.3f}", f"{row.error:.1e}")
    Console().print(table)
    write(json_file, options=asdict(options), rows=[asdict(row) for row in rows])


if __name__ == "__main__":
    typer.run(main)
