"""Time of the `zgraph` command on a deep model, start-up included: python -m benchmarks.cli

A Llama of the shape of Llama-3 70B is traced under fake tensors, and its run file looked at, on processors, each
command in a process of its own. Where a core is shared, wall clock and the time on a core differ.
"""

from __future__ import annotations

import json
import os
import resource
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

from benchmarks.results import environment

NODE = "primals_365_full_start"
"""The gather of a parameter in the middle of 80 layers."""

COMMANDS = (
    "trace . --hardware 8x8-h100 -o run.zg",
    "opt run.zg",
    "diff run.zg@keep @bucket --stat",
    f"explain run.zg {NODE}",
    "show run.zg@all-gather --op wait --phase fwd",
    "simulate run.zg",
    "passes",
    "--help",
)


@dataclass(frozen=True)
class Timed:
    """Seconds that a command took: on the wall clock, and on a core."""

    command: str
    wall_s: float
    core_s: float


def config(num_layers: int) -> dict[str, object]:
    """Llama-3 70B's, with so many layers."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": num_layers,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    }


def timed(command: str, folder: Path) -> Timed:
    """Run a command in a folder."""
    line = [sys.executable, "-m", "zgraph", *command.split()]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(line, cwd=folder, env=env, check=True, capture_output=True)
    wall_s, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return Timed(command, wall_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def main(
    layers: Annotated[int, typer.Option(min=41, help="Layers of the model.")] = 80,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    results: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
) -> None:
    """Time the commands, one after the other, a few times over."""
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(config(layers)))
        for _ in range(rounds):
            found.append([timed(command, folder) for command in COMMANDS])
        run_bytes = (folder / "run.zg").stat().st_size
    table = Table("command", "wall s", "core s", title=f"{layers} layers; medians of {rounds}", title_justify="left")
    for runs in zip(*found, strict=True):
        wall_s, core_s = median(r.wall_s for r in runs), median(r.core_s for r in runs)
        table.add_row(f"zgraph {runs[0].command}", f"{wall_s:.1f}", f"{core_s:.1f}")
    Console(width=110).print(table)
    if results is not None:
        rows = [[asdict(r) for r in runs] for runs in found]
        report = {"environment": environment(), "layers": layers, "run_bytes": run_bytes, "rounds": rows}
        results.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
