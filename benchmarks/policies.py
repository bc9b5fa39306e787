"""Three ways to place the same collectives, on the same clock: python -m benchmarks.policies

Llama-3 70B in bf16 at ZeRO-3 on 128 A100-80 (16 hosts of 8, 200 Gbit/s a GPU between them), one sequence of 4,096
tokens a GPU: traced under fake tensors, scheduled and simulated on this machine, without a GPU.

    prefetch one    a layer's parameters are one bucket; the next layer's gather starts when the last one has arrived,
                    reductions are waited for one layer later (what FSDP2 does)
    greedy          each gather is hoisted as early as memory allows, in the order of first use (what DeepCompile does)
    zgraph          the recipe of stage 3
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

import zgraph
from benchmarks.prefetch import Prefetch
from zgraph.cost import CostTable, hardware, simulate
from zgraph.ir import Axis, Graph
from zgraph.passes import RECIPES, Context, make_plan, parse_recipe
from zgraph.passes.analysis.timetable import evaluate, first_use_order
from zgraph.passes.schedule import LoweredStep, Schedule, lower_bound_us

LLAMA_3_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "use_cache": False,
}
LAYER_BUCKET = "bucket(max_bytes=1700MiB,pack_below_bytes=1700MiB)"
LOWERED = RECIPES[3].split(",schedule")[0]


def capture(num_layers: int, sequence: int) -> Graph:
    """The model's training step as a graph, without memory."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode():
            model = LlamaForCausalLM(LlamaConfig(**{**LLAMA_3_70B, "num_hidden_layers": num_layers}))
    finally:
        torch.set_default_dtype(usual)
    tokens = torch.zeros(1, sequence, dtype=torch.int64)
    return zgraph.trace(model, input_ids=tokens, labels=tokens)


def prefetch_one(graph: Graph, context: Context) -> Graph:
    recipe = f"{LOWERED.replace('keep,bucket', LAYER_BUCKET)},{Prefetch.name},dce"
    return parse_recipe(recipe).run(graph, context, [])


def greedy(graph: Graph, context: Context) -> Graph:
    lowered = parse_recipe(LOWERED).run(graph, context, [])
    step = LoweredStep(lowered, context)
    problem = step.problem(step.headroom(Schedule().num_ahead))
    found = evaluate(problem, first_use_order(problem))
    assert found is not None
    _, timetable, waits = step.waits(problem, found, slack=0.0)
    return step.placed(timetable, waits)


def ours(graph: Graph, context: Context) -> Graph:
    return parse_recipe(RECIPES[3]).run(graph, context, [])


def main(
    layers: Annotated[int, typer.Option(min=1, help="Fewer make a quick trial.")] = 80,
    target: Annotated[str, typer.Option(help="Hardware.")] = "16x8-a100-80",
    sequence: Annotated[int, typer.Option(min=1, help="Tokens a GPU.")] = 4096,
) -> None:
    """Print exposed communication and step time of each policy."""
    profile = hardware(target)
    context = Context(mesh=(Axis("shard", profile.num_devices),), costs=CostTable(hardware=profile))
    began = time.monotonic()
    graph = capture(layers, sequence)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(f"captured {len(graph.nodes):,} nodes in {time.monotonic() - began:.0f} s")
    columns = (
        "policy",
        "step s",
        "computing s",
        "communication s",
        "exposed s",
        "bound s",
        "gap",
        "peak GiB",
        "planned in s",
    )
    table = Table(*columns, title=f"Llama-3 70B, {layers} layers, ZeRO-3 on {target}", title_justify="left")
    for name, policy in (("prefetch one", prefetch_one), ("greedy", greedy), ("zgraph", ours)):
        began = time.monotonic()
        final = policy(graph, context)
        taken = time.monotonic() - began
        timeline = simulate(make_plan(final), context.costs, context.hints)
        bound_us = lower_bound_us(final, replace(context))
        table.add_row(
            name,
            f"{timeline.step_us / 1e6:.3f}",
            f"{timeline.busy_us['compute'] / 1e6:.3f}",
            f"{timeline.busy_us['comm'] / 1e6:.3f}",
            f"{timeline.exposed_us / 1e6:.3f}",
            f"{bound_us / 1e6:.3f}",
            f"{timeline.step_us / bound_us - 1:.1%}",
            f"{timeline.memory.peak.total_bytes / 2**30:.1f}",
            f"{taken:.0f}",
        )
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
