"""Peaks of twelve models, predicted and measured, at every stage: python -m benchmarks.peaks --json peaks.json

Each case trains on two ranks of this machine, in fresh processes that are forked from one that has imported everything.
Counted is what torch's allocator has handed out and not taken back over whole steps with AdamW, beside the peak that
the report said.
"""

from __future__ import annotations

import json
import socket
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import zgraph
from benchmarks.memory import measure
from benchmarks.peak_models import MODELS
from benchmarks.results import write

FORK: Any = get_context("fork")
NUM_RANKS = 2
WARMUP = 2
STEPS = 5
"""Steps that are measured: whether two collectives are under way at the peak is a matter of time, and predicted."""

BOUND = 0.01
"""How far a prediction may be off."""


@dataclass(frozen=True)
class Peak:
    """A case: the largest peak of its ranks, and what was predicted of the same rank.

    above_rest: predicted over measured, less 1, of the step above what lies at rest.
    error: the same of the whole peak.
    steps: that were measured.
    """

    model: str
    stage: int
    num_parameters: int
    predicted_bytes: int
    measured_bytes: int
    rest_bytes: int
    error: float
    above_rest: float
    failure: str = ""
    steps: int = STEPS


def main(
    model: Annotated[list[str] | None, typer.Option(help=f"{', '.join(MODELS)}; may repeat. All if left out.")] = None,
    stage: Annotated[list[int] | None, typer.Option(min=0, max=3, help="May repeat. All if left out.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that one case may take.")] = 300.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the results to.")] = None,
) -> None:
    """Predict and measure the peak of a training step, and print a table.

    Cases that are in the file already are not run again.
    """
    torch.set_num_threads(1)
    found: list[Peak] = []
    if json_file is not None and json_file.exists():
        found = [Peak(**kept) for kept in json.loads(json_file.read_text())["results"]]
    done = {(peak.model, peak.stage) for peak in found if not peak.failure}
    for name in model or MODELS:
        for number in stage or range(4):
            if (name, number) in done:
                continue
            began = time.perf_counter()
            found.append(case(name, number, timeout))
            said = found[-1].failure or f"{found[-1].error:+.2%}, above rest {found[-1].above_rest:+.2%}"
            typer.echo(f"{name}, stage {number}: {said} ({time.perf_counter() - began:.0f} s)", err=True)
            write(json_file, options={"num_ranks": NUM_RANKS, "warmup": WARMUP}, results=[asdict(p) for p in found])
    Console().print(table(found))
    within = sum(abs(p.error) <= BOUND and not p.failure for p in found)
    typer.echo(f"{within} of {len(found)} cases within {BOUND:.0%}")


def case(name: str, stage: int, timeout_s: float) -> Peak:
    """One model at one stage, on ranks that begin and end here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes: list[Connection] = []
    ranks = []
    for rank in range(NUM_RANKS):
        ours, theirs = FORK.Pipe()
        ranks.append(FORK.Process(target=_rank, args=(name, stage, rank, port, theirs), daemon=True))
        ranks[-1].start()
        theirs.close()
        pipes.append(ours)
    try:
        answers = [_answer(pipe, timeout_s) for pipe in pipes]
    finally:
        for process in ranks:
            process.kill()
            process.join()
    if failures := [a for a in answers if isinstance(a, str)]:
        return Peak(name, stage, 0, 0, 0, 0, 0.0, 0.0, failures[0])
    return max((a for a in answers if isinstance(a, Peak)), key=lambda peak: peak.measured_bytes)


def table(found: list[Peak]) -> Table:
    """The errors of each model at each stage."""
    shown = Table(title=f"peaks of {NUM_RANKS} ranks, predicted over measured", title_justify="left")
    shown.add_column("model")
    for stage in range(4):
        shown.add_column(f"stage {stage}", justify="right")
    shown.add_column("measured at stage 3", justify="right")
    for name in dict.fromkeys(peak.model for peak in found):
        by_stage = {peak.stage: peak for peak in found if peak.model == name}
        cells = [_cell(by_stage.get(stage)) for stage in range(4)]
        last = by_stage[max(by_stage)]
        shown.add_row(name, *cells, f"{last.measured_bytes / 2**20:.1f} MiB")
    return shown


def _cell(peak: Peak | None) -> str:
    return "" if peak is None else "failed" if peak.failure else f"{peak.error:+.2%}"


def _answer(pipe: Connection, timeout_s: float) -> Peak | str:
    try:
        return pipe.recv() if pipe.poll(timeout_s) else f"no answer within {timeout_s:.0f} s"
    except EOFError:
        return "the process ended"


def _rank(name: str, stage: int, rank: int, port: int, pipe: Connection) -> None:
    warnings.simplefilter("ignore")
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=NUM_RANKS,
            timeout=timedelta(minutes=5),
        )
        pipe.send(_measured(name, stage))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {str(error)[:300]}")
    pipe.recv()  # until this process is ended, so that no rank waits for one that has gone


def _measured(name: str, stage: int) -> Peak:
    torch.manual_seed(0)
    build, batch = MODELS[name]
    given = batch()  # the caller's, which is not counted
    made: list[Any] = []

    def prepare() -> Callable[[int], Tensor]:
        model = zgraph.compile(build().train(), stage=stage)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        made.append(model)

        def step(number: int) -> Tensor:
            for _ in range(STEPS if number == WARMUP else 1):
                loss: Tensor = model(**given)["loss"]
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
            return loss.detach()

        return step

    live = measure(prepare, warmup=WARMUP, device=torch.device("cpu"))
    report = zgraph.report(made[0])
    parts = report.rest_bytes + report.state_bytes + report.buffer_bytes
    above = max(live.peak_bytes - live.rest_bytes, 1)
    return Peak(
        name,
        stage,
        report.whole_bytes // 4,
        report.peak_bytes,
        live.peak_bytes,
        live.rest_bytes,
        report.peak_bytes / live.peak_bytes - 1,
        (report.peak_bytes - parts) / above - 1,
    )


if __name__ == "__main__":
    typer.run(main)
