"""From the call of the compiler to the end of the first step: python -m benchmarks.compile_time

A Llama of many identical layers, trained on one process: by torch.compile, and in regions that Inductor compiles,
each different one once (`kernels="inductor"`). Every run is a process of its own with an empty cache of kernels. What a
machine does once (the compiler's precompiled headers, the test of its vector instructions) is done before the clock
starts, by compiling something small.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.results import write

SYSTEMS = ("torch.compile", "inductor", "aten")

NUM_STEPS = 5


@dataclass(frozen=True)
class Timed:
    """Seconds of the first step, compiling included, and of a step after that; regions that were compiled."""

    system: str
    first_s: float
    step_s: float
    regions: str
    loss: float


def run(system: str, num_layers: int, width: int) -> Timed:
    """Compile and train for a few steps, in this process."""
    import torch
    import transformers as hf

    import zgraph

    torch.manual_seed(0)
    small = torch.compile(lambda x: (x.sin() + 1).sum())
    small(torch.ones(8, 8, requires_grad=True)).backward()
    torch.compiler.reset()
    config = hf.LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1000,
        use_cache=False,
    )
    model = hf.LlamaForCausalLM(config).train()
    ids = torch.randint(1000, (2, 64))
    taken, losses = [], []
    for step in range(1 + NUM_STEPS):
        began = time.perf_counter()
        if step == 0:
            trained = torch.compile(model) if system == "torch.compile" else zgraph.compile(model, kernels=system)  # type: ignore[arg-type]
        loss = trained(input_ids=ids, labels=ids).loss
        loss.backward()
        taken.append(time.perf_counter() - began)
        losses.append(loss.item())
        model.zero_grad()
    regions = "" if system == "torch.compile" else str(zgraph.report(model).regions or "")
    return Timed(system, taken[0], median(taken[1:]), regions, losses[0])


def apart(system: str, num_layers: int, width: int) -> Timed:
    """The same in a process of its own, with an empty cache of kernels."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "benchmarks.compile_time",
                "--layers",
                str(num_layers),
                "--width",
                str(width),
                "--only",
                system,
            ],
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder},
            capture_output=True,
            text=True,
            check=True,
        )
    return Timed(**json.loads(done.stdout.splitlines()[-1]))


def main(
    layers: Annotated[int, typer.Option(min=1, help="Layers of the model.")] = 32,
    width: Annotated[int, typer.Option(min=8, help="Width of the hidden state.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Each system runs once a round.")] = 3,
    only: Annotated[str, typer.Option(help="Run one system in this process, and write what it took.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the results to.")] = None,
) -> None:
    """Time all systems in turns, and print medians."""
    if only:
        print(json.dumps(asdict(run(only, layers, width))))
        return
    found = [[apart(system, layers, width) for system in SYSTEMS] for _ in range(rounds)]
    table = Table(title=f"Llama of {layers} layers, width {width}", title_justify="left")
    for column in ("system", "first step s", "of torch.compile", "step ms", "regions"):
        table.add_column(column, justify="left" if column in ("system", "regions") else "right")
    for index, system in enumerate(SYSTEMS):
        rows = [each[index] for each in found]
        share = median(each[index].first_s / each[0].first_s for each in found)
        table.add_row(
            system,
            f"{median(r.first_s for r in rows):.1f}",
            f"{share:.2f}",
            f"{1e3 * median(r.step_s for r in rows):.0f}",
            rows[0].regions,
        )
    Console().print(table)
    write(json_file, layers=layers, width=width, rounds=[[asdict(t) for t in r] for r in found])


if __name__ == "__main__":
    typer.run(main)
