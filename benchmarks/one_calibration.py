"""Steps on emulated hosts at several rates, predicted after one calibration: python -m benchmarks.one_calibration

Training is recorded (`zgraph.compile(model, record=)`) at the first rate, and a profile is fitted to it as by `zgraph
calibrate`. For each other rate the profile is told what the link between hosts carries, and nothing else; steps are
recorded there too, and compared. The wire is busy while the software is with the next message: a transfer takes what
the calibration found, or what its bytes take on the wire, whichever is longer.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table
from scipy.optimize import nnls

import zgraph
from benchmarks import models
from benchmarks.errors import BenchmarkError, RankFailed
from benchmarks.hosts import Host, emulated, link_bytes_per_s
from benchmarks.results import write
from zgraph.cost import Hardware
from zgraph.estimate.calibration import calibrate
from zgraph.estimate.comparison import costs_on, predicted
from zgraph.ir import OPS
from zgraph.runfile.records import read_record

RATES = ("10gbit", "3gbit", "1gbit", "300mbit")
REPOSITORY = Path(__file__).resolve().parents[1]
BOUND = 0.1
"""How far a prediction may be off."""


@dataclass(frozen=True)
class Outcome:
    """Steps at one rate: the median that was measured, and predicted before and after the calibration."""

    rate: str
    stage: int
    num_steps: int
    measured_ms: float
    low_ms: float
    high_ms: float
    uncalibrated_ms: float
    predicted_ms: float
    error: float
    is_calibrated: bool


def main(
    model: Annotated[str, typer.Option(help=", ".join(models.NAMES))] = "llama-8m",
    stage: Annotated[list[int] | None, typer.Option(min=0, max=3, help="May repeat. 3 if left out.")] = None,
    rate: Annotated[
        list[str] | None, typer.Option(help="As tc spells it; the first is the one to calibrate at.")
    ] = None,
    compress: Annotated[str, typer.Option(help="Codec of gradients, and at stages 1 and 2 of parameters.")] = "",
    steps: Annotated[int, typer.Option(min=6, help="Steps at each rate, of which the first are not kept.")] = 40,
    timeout: Annotated[float, typer.Option(help="Seconds that one rate may take.")] = 300.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the results to.")] = None,
) -> None:
    """Calibrate at one rate, predict the others, and print a table."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # a killed run, too, ends its ranks and its hosts
    stages, rates = stage or [3], rate or list(RATES)
    found: list[Outcome] = []
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for one in rates:
                for number in stages:
                    record(model, number, one, compress, steps, timeout, folder / f"{one}-{number}")
                    typer.echo(f"{one}, stage {number}: recorded", err=True)
            fitted = calibrate(*(folder / f"{rates[0]}-{number}" for number in stages)).hardware
            for one in rates:
                for number in stages:
                    told = at_rate(fitted, one, folder / f"{one}-{number}")
                    found.append(outcome(folder / f"{one}-{number}", number, one, told, one == rates[0]))
    except BenchmarkError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(1) from error
    options = {"model": model, "stages": stages, "rates": rates, "compress": compress, "steps": steps}
    write(json_file, options=options, profile=json.loads(fitted.model_dump_json()), results=[asdict(o) for o in found])
    Console().print(table(model, found))
    within = sum(abs(o.error) <= BOUND for o in found)
    typer.echo(f"{within} of {len(found)} within {BOUND:.0%}")


def at_rate(fitted: Hardware, rate: str, folder: Path) -> Hardware:
    """The profile with another link between hosts: the line next to what the messages of a step take there."""
    graph, link = read_record(folder).run.graph(), fitted.between
    comm = [node for node in graph.nodes if node.op in OPS and OPS[node.op].lane == "comm"]
    sizes = np.array([OPS[node.op].wire_bytes(node, graph.mesh) for node in comm], float)
    took_s = np.maximum(link.latency_us / 1e6 + sizes / link.rate, sizes / link_bytes_per_s(rate))
    (latency_s, s_per_byte), _ = nnls(np.stack([np.ones_like(sizes), sizes], 1), took_s)
    told = link.model_copy(update={"latency_us": 1e6 * latency_s, "bytes_per_s": 1 / s_per_byte, "share": 1.0})
    return fitted.model_copy(update={"between": told})


def outcome(folder: Path, stage: int, rate: str, told: Hardware, is_calibrated: bool) -> Outcome:
    """Steps that were recorded at a rate, beside those predicted for it."""
    record = read_record(folder)
    us = predicted(record, costs_on(record, told)).step_us
    return Outcome(
        rate,
        stage,
        record.num_steps,
        record.step_us / 1e3,
        record.quantile_us(0.1) / 1e3,
        record.quantile_us(0.9) / 1e3,
        predicted(record).step_us / 1e3,
        us / 1e3,
        us / record.step_us - 1,
        is_calibrated,
    )


def record(model: str, stage: int, rate: str, compress: str, steps: int, timeout_s: float, folder: Path) -> None:
    """Train on two emulated hosts, one rank on each, and keep what steps take.

    Raises:
        BenchmarkError: this machine cannot emulate hosts, or a rank failed.
    """
    with emulated(2, rate) as hosts, tempfile.TemporaryDirectory() as meeting:
        ranks = [
            _started(host, rank, hosts, model, stage, compress, steps, folder, Path(meeting))
            for rank, host in enumerate(hosts)
        ]
        try:
            for rank, process in enumerate(ranks):
                said, _ = process.communicate(timeout=timeout_s)
                if process.returncode:
                    last = (said.strip().splitlines() or ["it said nothing"])[-1]
                    raise RankFailed(
                        f"rank {rank}: {last}", "Run with --model llama-tiny to see whether it is the model"
                    )
        except subprocess.TimeoutExpired:
            raise RankFailed(
                f"the ranks did not end within {timeout_s:.0f} s", "Give them longer with --timeout"
            ) from None
        finally:
            for process in ranks:
                process.kill()
                process.wait()


def _started(
    host: Host,
    rank: int,
    hosts: Sequence[Host],
    model: str,
    stage: int,
    compress: str,
    steps: int,
    folder: Path,
    meeting: Path,
) -> subprocess.Popen[str]:
    words = (str(rank), str(len(hosts)), model, str(stage), compress, str(steps), str(folder), str(meeting))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": host.interface,
        "PYTHONWARNINGS": "ignore",
    }
    return subprocess.Popen(
        [*host.prefix, sys.executable, "-m", "benchmarks.one_calibration_rank", *words],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def train(
    rank: int, num_ranks: int, model: str, stage: int, compress: str, steps: int, folder: Path, meeting: Path
) -> None:
    """One rank: train and record."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}/store", rank=rank, world_size=num_ranks, timeout=timedelta(minutes=5)
    )
    device = torch.device("cpu")
    codes = {"gradients": compress} | ({"parameters": compress} if stage in (1, 2) else {})
    compiled = zgraph.compile(
        models.build(model, device), stage=stage, compress=codes if compress else None, record=folder
    )
    optimizer = torch.optim.AdamW(compiled.parameters(), lr=1e-4)
    for step in range(steps):
        tokens = models.batch(model, step=step, rank=rank, device=device)
        compiled(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    dist.barrier()
    dist.destroy_process_group()


def table(model: str, found: Sequence[Outcome]) -> Table:
    """The steps at each rate."""
    shown = Table(title=f"{model}, two emulated hosts, forward and backward, ms", title_justify="left")
    for column in ("rate", "stage", "measured", "80 % of steps", "built-in profile", "calibrated", "error"):
        shown.add_column(column, justify="right")
    for one in found:
        shown.add_row(
            one.rate + " (calibration)" * one.is_calibrated,
            str(one.stage),
            f"{one.measured_ms:,.1f}",
            f"{one.low_ms:,.1f} to {one.high_ms:,.1f}",
            f"{one.uncalibrated_ms:,.1f}",
            f"{one.predicted_ms:,.1f}",
            f"{one.error:+.1%}",
        )
    return shown


if __name__ == "__main__":
    typer.run(main)
