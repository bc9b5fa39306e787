"""The losses of 50 steps, op by op and in generated kernels: python -m benchmarks.curves --json curves.json

A Llama trains on text from Python's own library, four times from the same seed on the same batches: with
`kernels="aten"` and with `kernels="triton"`, in fp32, and in bf16 with masters in fp32. On processors the kernels'
reference implementations in torch run, which compute the same. The difference between bf16 and fp32, op by op in both,
is drawn beside the others as a scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

import zgraph
from benchmarks.models import SEED, llama
from benchmarks.results import write
from examples.text import load_corpus, sample_batch
from zgraph.options.validate import Kernels

DTYPES: Mapping[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}
KERNELS: tuple[Kernels, ...] = ("aten", "triton")
VOCABULARY, WIDTH, INNER, NUM_LAYERS, NUM_HEADS = 2048, 128, 352, 4, 4

INK = "#7d8590"
"""Of words and axes: it can be read on white and on black."""

COLOURS = {"fp32": "#2f81f7", "bf16": "#e8710a"}


@dataclass(frozen=True)
class Options:
    num_steps: int
    batch_size: int
    sequence_length: int
    learning_rate: float
    is_constant: bool
    device: str


def losses(kernels: Kernels, dtype: torch.dtype | None, tokens: torch.Tensor, options: Options) -> list[float]:
    """Train from the seed; the loss of each step."""
    torch.compiler.reset()
    torch.manual_seed(SEED)
    with torch.device(options.device):
        config = llama(WIDTH, INNER, NUM_LAYERS, NUM_HEADS, VOCABULARY)
        whole = AutoModelForCausalLM.from_config(config).train()  # type: ignore[no-untyped-call]
    model = zgraph.compile(whole, kernels=kernels, param_dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    schedules = torch.optim.lr_scheduler
    schedule = (
        schedules.ConstantLR(optimizer, factor=1.0)
        if options.is_constant
        else schedules.OneCycleLR(optimizer, options.learning_rate, total_steps=options.num_steps)
    )
    found = []
    for step in range(options.num_steps):
        ids = sample_batch(tokens, options.batch_size, options.sequence_length, step=step, rank=0).to(options.device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def differences(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """Of each step, relative to the other."""
    return [abs(a - b) / b for a, b in zip(one, other, strict=True)]


def draw(curves: Mapping[str, Mapping[Kernels, Sequence[float]]], path: Path) -> None:
    """The losses above, their relative differences below; readable on light and on dark pages."""
    style: dict[Any, Any] = {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    with mpl.rc_context(style):
        figure = Figure(figsize=(7, 5), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        for order, (name, found) in enumerate(curves.items()):
            steps, dashes = range(1, 1 + len(found["aten"])), (4 * order, (4, 4))  # where one has a gap is the other
            wide = {"color": COLOURS[name], "alpha": 0.35, "lw": 8 - 3 * order}
            above.plot(steps, found["aten"], **wide, label=f'{name}, kernels="aten"')
            above.plot(steps, found["triton"], color=COLOURS[name], ls=dashes, label=f'{name}, kernels="triton"')
            apart = differences(found["triton"], found["aten"])
            below.plot(steps, apart, color=COLOURS[name], marker=".", lw=1, label=f"{name}: triton and aten")
        scale = differences(curves["bf16"]["aten"], curves["fp32"]["aten"])
        below.plot(steps, scale, color=INK, ls=":", lw=1.5, label="bf16 and fp32, both aten")
        below.set_yscale("log", nonpositive="mask")
        below.set(xlabel="step", ylabel="relative difference\nof the losses", xlim=(0, len(steps) + 1))
        above.set_ylabel("loss (nats a token)")
        for axes, columns in ((above, 2), (below, 3)):
            axes.grid(color=INK, alpha=0.25, lw=0.5)
            axes.legend(ncols=columns, fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), borderpad=0)
        figure.savefig(path, dpi=140, transparent=True, metadata={"Software": None})


def main(
    num_steps: Annotated[int, typer.Option("--steps", min=4, help="Optimizer steps of each run.")] = 50,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in a batch.")] = 8,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 128,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW at its highest: it rises and falls.")] = 2e-3,
    is_constant: Annotated[bool, typer.Option("--constant", help="Keep the rate as high throughout.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the losses to.")] = None,
    picture: Annotated[Path | None, typer.Option(help="PNG or SVG to draw them in.")] = None,
) -> None:
    """Train four times, and print how far the losses are apart."""
    options = Options(num_steps, batch_size, sequence_length, learning_rate, is_constant, device)
    tokens = load_corpus(VOCABULARY).tokens
    curves = {name: {k: losses(k, dtype, tokens, options) for k in KERNELS} for name, dtype in DTYPES.items()}
    table = Table(title=f"{num_steps} steps", title_justify="left")
    for column in ("dtype", "first loss", "last loss, aten", "last loss, triton", "largest relative difference"):
        table.add_column(column, justify="left" if column == "dtype" else "right")
    largest: dict[str, float] = {}
    for name, found in curves.items():
        largest[name] = max(differences(found["triton"], found["aten"]))
        aten, triton = found["aten"], found["triton"]
        table.add_row(name, f"{aten[0]:.4f}", f"{aten[-1]:.4f}", f"{triton[-1]:.4f}", f"{largest[name]:.1e}")
    Console().print(table)
    write(json_file, options=asdict(options), largest_relative_difference=largest, losses=curves)
    if picture is not None:
        draw(curves, picture)


if __name__ == "__main__":
    typer.run(main)
