"""AdamW's step with its moments on disk, mapped and past the page cache: python -m benchmarks.disk

Twice: with the host's memory free, and with all but a part of the file's size taken by something else, as it is where
states need a disk. What a step leaves in the page cache to be written later is written before the next is timed, and
reported beside it.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.results import write
from zgraph.optim import AdamW
from zgraph.runtime.host import available_bytes

TENSOR_BYTES = 64 << 20


@dataclass(frozen=True)
class Timed:
    """Medians over the steps: of a step, and of writing what it left in the page cache."""

    access: str
    room_bytes: int
    step_s: float
    flush_s: float


def parameters(num_bytes: int) -> list[torch.nn.Parameter]:
    found = [torch.nn.Parameter(torch.zeros(TENSOR_BYTES // 4)) for _ in range(num_bytes // TENSOR_BYTES)]
    for parameter in found:
        parameter.grad = torch.ones_like(parameter)
    return found


def main(
    gib: Annotated[int, typer.Option(min=1, help="GiB of the two moments.")] = 4,
    num_steps: Annotated[int, typer.Option(min=1, help="Timed steps of each.")] = 4,
    share: Annotated[
        float, typer.Option(help="Part of the moments that the host has room for where it is full.")
    ] = 0.25,
    folder: Annotated[Path, typer.Option(help="Where the files go.")] = Path("/tmp"),
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the results to.")] = None,
) -> None:
    """Time steps of both in turns, and print the medians."""
    state_bytes = gib << 30
    optimizers = {
        access: AdamW(parameters(state_bytes // 2), state="disk", access=access, folder=folder)
        for access in ("mapped", "direct")
    }
    for optimizer in optimizers.values():
        optimizer.step()
    table = Table(title=f"{gib} GiB of moments, {num_steps} steps in turns", title_justify="left")
    for column in ("access", "host has room for", "step s", "written after s"):
        table.add_column(column, justify="left" if column == "access" else "right")
    found = []
    for is_full in (False, True):
        ballast = torch.empty(0)
        if is_full:
            os.sync()
            ballast = torch.ones(max(available_bytes() - int(share * state_bytes), 0), dtype=torch.uint8)
        room_bytes = available_bytes()
        taken: dict[str, list[tuple[float, float]]] = {access: [] for access in optimizers}
        for _ in range(num_steps):
            for access, optimizer in optimizers.items():
                began = time.perf_counter()
                optimizer.step()
                stepped = time.perf_counter()
                os.sync()
                taken[access].append((stepped - began, time.perf_counter() - stepped))
        del ballast
        for access, times in taken.items():
            step_s, flush_s = (median(column) for column in zip(*times, strict=True))
            found.append(Timed(access, room_bytes, step_s, flush_s))
            table.add_row(access, f"{room_bytes / 2**30:.1f} GiB", f"{step_s:.2f}", f"{flush_s:.2f}")
    Console().print(table)
    write(json_file, state_bytes=state_bytes, rows=[asdict(t) for t in found])


if __name__ == "__main__":
    typer.run(main)
