"""Memory and time of the cross-entropy of a large vocabulary, whole and block by block: python -m benchmarks.loss"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

import zgraph
from benchmarks.memory import measure
from benchmarks.results import write

NUM_STEPS = 3


class Head(nn.Module):
    """The last projection of a model, and its loss."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, num_classes, bias=False)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.project(x), target)


@dataclass(frozen=True)
class Measured:
    """The most bytes alive in a step above what lies at rest (parameters, inputs, their gradients); median of steps."""

    kernels: str
    peak_bytes: int
    seconds: float


def measured(kernels: str, num_tokens: int, width: int, num_classes: int) -> Measured:
    torch.compiler.reset()
    torch.manual_seed(0)
    model = zgraph.compile(Head(width, num_classes), kernels=kernels)  # type: ignore[arg-type]
    x = torch.randn(num_tokens, width, requires_grad=True)
    target = torch.randint(num_classes, (num_tokens,))
    seconds: list[float] = []

    def prepare() -> Callable[[int], torch.Tensor]:
        def step(_: int) -> torch.Tensor:
            began = time.perf_counter()
            x.grad = None
            model.zero_grad()
            loss: torch.Tensor = model(x, target)
            loss.backward()
            seconds.append(time.perf_counter() - began)
            return loss

        return step

    live = measure(prepare, warmup=NUM_STEPS, device=torch.device("cpu"))
    return Measured(kernels, live.peak_bytes - live.rest_bytes, median(seconds[1:NUM_STEPS]))


def main(
    num_tokens: Annotated[int, typer.Option(min=1, help="Tokens.")] = 8192,
    width: Annotated[int, typer.Option(min=1, help="Of the hidden state.")] = 128,
    num_classes: Annotated[int, typer.Option(min=1, help="Words of the vocabulary.")] = 128_256,
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the results to.")] = None,
) -> None:
    """Measure both on processors in fp32, and print them."""
    table = Table(title=f"{num_tokens:,} tokens, {num_classes:,} words, width {width}", title_justify="left")
    for column in ("kernels", "peak MB above rest", "s a step"):
        table.add_column(column, justify="left" if column == "kernels" else "right")
    found = [measured(kernels, num_tokens, width, num_classes) for kernels in ("aten", "triton")]
    for row in found:
        table.add_row(row.kernels, f"{row.peak_bytes / 1e6:,.0f}", f"{row.seconds:.2f}")
    Console().print(table, f"{found[1].peak_bytes / found[0].peak_bytes:.1%} of the memory")
    write(json_file, num_tokens=num_tokens, width=width, num_classes=num_classes, rows=[asdict(m) for m in found])


if __name__ == "__main__":
    typer.run(main)
