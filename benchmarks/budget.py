"""Time to plan a step within a memory budget, for 80 layers captured one by one: python -m benchmarks.budget"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import zgraph
from benchmarks.policies import LLAMA_3_70B
from benchmarks.results import write
from zgraph.bridge.target import cost_table
from zgraph.cost import simulate_memory
from zgraph.ir import Axis
from zgraph.passes import RECIPES, Context, make_plan, parse_recipe
from zgraph.passes.core.instruments import Log

NUM_RANKS = 64


@dataclass(frozen=True)
class Planned:
    """One budget: bytes for the step above what lies at rest, the peak found, seconds of all passes and of `fit`."""

    offloads: str
    step_bytes: int
    peak_bytes: int
    seconds: float
    fit_seconds: float


def main(
    num_layers: Annotated[int, typer.Option(min=1, help="Layers, of Llama-3 70B's size.")] = 80,
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the results to.")] = None,
) -> None:
    """Run stage 3's recipe with several budgets, without and with the host's memory, and print the seconds."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**{**LLAMA_3_70B, "num_hidden_layers": num_layers}))
    tokens = torch.zeros(1, 4096, dtype=torch.int64)
    began = time.perf_counter()
    graph = zgraph.trace(model, input_ids=tokens, labels=tokens, param_dtype=torch.bfloat16)
    capture_seconds = time.perf_counter() - began
    rest_bytes = 12 * sum(p.numel() for p in model.parameters()) // NUM_RANKS
    context = Context(
        mesh=(Axis("shard", NUM_RANKS),),
        costs=cost_table("8x8-h100", torch.device("cpu")),
        groups_calls=True,
        keeps_blocks=True,
        rest_bytes=rest_bytes,
    )
    table = Table(title=f"{len(graph.nodes):,} nodes captured in {capture_seconds:.0f} s", title_justify="left")
    for column in ("host", "step GB", "peak GB", "passes s", "of which fit s"):
        table.add_column(column, justify="right" if column != "host" else "left")
    found = []
    for offloads, step_bytes in (("never", 45e9), ("never", 30e9), ("auto", 45e9)):
        limited = replace(context, memory_budget=rest_bytes + int(step_bytes), offloads=offloads)  # type: ignore[arg-type]
        log = Log()
        began = time.perf_counter()
        planned = parse_recipe(RECIPES[3]).run(graph, limited, [log])
        seconds = time.perf_counter() - began
        peak_bytes = simulate_memory(make_plan(planned, only_step=True), {}).peak.total_bytes
        fit_seconds = next(s.seconds for s in log.steps if s.text == "fit")
        found.append(Planned(offloads, int(step_bytes), peak_bytes, seconds, fit_seconds))
        table.add_row(
            offloads, f"{step_bytes / 1e9:.1f}", f"{peak_bytes / 1e9:.1f}", f"{seconds:.1f}", f"{fit_seconds:.1f}"
        )
    Console().print(table)
    write(json_file, capture_seconds=capture_seconds, rows=[asdict(p) for p in found])


if __name__ == "__main__":
    typer.run(main)
