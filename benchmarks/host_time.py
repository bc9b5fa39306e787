"""The host's time for each node of a step: python -m benchmarks.host_time

Tiny layers, so that kernels take next to nothing. Depths that differ tell what a node costs from what a step costs.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import zgraph
from benchmarks.results import write

SYSTEMS: dict[str, Callable[[nn.Module], Any]] = {
    "eager": lambda model: model,
    "zgraph aten": lambda model: zgraph.compile(model, stage=0, kernels="aten"),
    "torch.compile": torch.compile,
    "zgraph inductor": lambda model: zgraph.compile(model, stage=0, kernels="inductor"),
}


@dataclass(frozen=True)
class Row:
    """The host's time of one system, forward and backward.

    node_us: microseconds a node: the slope between two depths, over the nodes that zgraph has for them.
    fixed_ms: milliseconds a step beside that.
    ratio: of `node_us` to eager's.
    steps_ms: milliseconds of the fastest step at each depth.
    """

    system: str
    node_us: float
    fixed_ms: float
    ratio: float
    steps_ms: dict[int, float]


def llama(layers: int) -> nn.Module:
    """A Llama of a few numbers a layer."""
    config = LlamaConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=16,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def fastest_ms(models: dict[str, Any], rounds: int, steps: int) -> dict[str, float]:
    """CPU time of this thread and of autograd's, which is the same on processors, for the fastest step of each."""
    ids = torch.zeros(1, 2, dtype=torch.int64)
    found = dict.fromkeys(models, float("inf"))
    for number in range(rounds + 1):
        for name, model in models.items():
            for _ in range(steps):
                began = time.thread_time()
                model(input_ids=ids, labels=ids).loss.backward()
                taken = 1e3 * (time.thread_time() - began)
                found[name] = min(found[name], taken) if number else found[name]
                for parameter in model.parameters():
                    parameter.grad = None
    return found


def measured(shallow: int, deep: int, rounds: int, steps: int, systems: list[str]) -> list[Row]:
    """All systems at both depths, in turns."""
    taken: dict[int, dict[str, float]] = {}
    nodes: dict[int, int] = {}
    for layers in (shallow, deep):
        torch.compiler.reset()
        torch.manual_seed(0)
        model = llama(layers)
        models = {name: SYSTEMS[name](copy.deepcopy(model)) for name in systems}
        taken[layers] = fastest_ms(models, rounds, steps)
        nodes[layers] = len(zgraph.report(models["zgraph aten"]).entries[0].plan.graph.nodes)
    rows: list[Row] = []
    for name in systems:
        small, large = taken[shallow][name], taken[deep][name]
        node_us = 1e3 * (large - small) / (nodes[deep] - nodes[shallow])
        fixed_ms = small - 1e-3 * node_us * nodes[shallow]
        ratio = node_us / (rows[0].node_us if rows else node_us)
        rows.append(Row(name, node_us, fixed_ms, ratio, {shallow: small, deep: large}))
    return rows


def main(
    shallow: Annotated[int, typer.Option(min=1, help="Layers of the shallow model.")] = 4,
    deep: Annotated[int, typer.Option(min=2, help="Layers of the deep one.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each system.")] = 10,
    steps: Annotated[int, typer.Option(min=1, help="Steps a turn.")] = 10,
    system: Annotated[list[str] | None, typer.Option(help="One of the systems; may repeat. All if not given.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the results to.")] = None,
) -> None:
    """Time all systems, and print what a node and a step cost each."""
    os.environ.setdefault("ZGRAPH_LOGS", "none")
    torch.set_num_threads(1)
    wanted = [name for name in SYSTEMS if not system or name in {*system, "eager", "zgraph aten"}]
    rows = measured(shallow, deep, rounds, steps, wanted)
    table = Table(title=f"host time, {shallow} and {deep} layers", title_justify="left")
    for column in ("system", "us a node", "of eager", "fixed ms", *(f"{n} layers ms" for n in (shallow, deep))):
        table.add_column(column, justify="left" if column == "system" else "right")
    for row in rows:
        steps_ms = (f"{ms:.2f}" for ms in row.steps_ms.values())
        table.add_row(row.system, f"{row.node_us:.2f}", f"{row.ratio:.2f}", f"{row.fixed_ms:.2f}", *steps_ms)
    Console(width=100).print(table)
    write(json_file, rows=[asdict(row) for row in rows])


if __name__ == "__main__":
    typer.run(main)
