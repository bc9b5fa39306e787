"""Training Llama-3 70B on 8, 64 and 128 GPUs, planned on this machine: python -m benchmarks.plans"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

import zgraph
from benchmarks.policies import LLAMA_3_70B
from benchmarks.results import write

CLUSTERS = ("1x8-h100", "8x8-h100", "16x8-h100")


def main(
    hardware: Annotated[list[str] | None, typer.Option(help="A profile; may repeat.")] = None,
    sequence: Annotated[int, typer.Option(min=1, help="Tokens of the one sequence of each rank.")] = 4096,
    host: Annotated[bool, typer.Option(help="Whether anything may go to the host's memory.")] = True,
    kernels: Annotated[
        Literal["aten", "auto"], typer.Option(help="What runs the ops; auto is what zgraph.compile takes.")
    ] = "aten",
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the results to.")] = None,
) -> None:
    """Plan all four stages, in bf16 with masters and AdamW in fp32, and print a table for each cluster."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA_3_70B))
    tokens = torch.zeros(1, sequence, dtype=torch.int64)
    began = time.perf_counter()
    found = []
    names = hardware or CLUSTERS
    plans = zgraph.sweep(
        model,
        input_ids=tokens,
        labels=tokens,
        hardware=names,
        param_dtype=torch.bfloat16,
        offload="auto" if host else None,
        kernels=kernels,
    )
    for name, plan in zip(names, plans, strict=True):
        Console(width=None if Console().is_terminal else 150).print(plan)
        found.append({"hardware": name, **asdict(plan)})
    seconds = time.perf_counter() - began
    typer.echo(f"{len(found)} plans of {len(found[0]['stages'])} stages in {seconds:.0f} s")
    write(json_file, sequence=sequence, seconds=seconds, plans=found)


if __name__ == "__main__":
    typer.run(main)
