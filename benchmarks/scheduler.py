"""How long scheduling takes as graphs grow: python -m benchmarks.scheduler

Synthetic training steps at stage 3 on 8 ranks: layers of a gathered matrix, a matmul and elementwise ops, forward and
backward. One core, no accelerator.
"""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from zgraph.cost import CostTable, hardware, simulate
from zgraph.ir import Axis, Graph, parse_graph
from zgraph.passes import RECIPES, Context, make_plan, parse_recipe
from zgraph.passes.schedule import Schedule, lower_bound_us

WIDTH, TOKENS, NUM_ELEMENTWISE = 4096, 8192, 18
SIZES = (1000, 2000, 5000, 10_000, 20_000, 50_000)
CONTEXT = Context(mesh=(Axis("shard", 8),), costs=CostTable(hardware=hardware("8x1-h100"), per_host=1))


def synthetic(num_layers: int) -> Graph:
    """A chain of layers, captured form: one matmul and some elementwise ops each, and their backward."""
    weight, rows = f"f32[{WIDTH}, {WIDTH}]", f"f32[{TOKENS}, {WIDTH}]"
    lines = ['graph "synthetic"', "op aten.mm.default", "op aten.tanh.default", "op aten.t.default views(0)"]
    lines += [f'param %w{i}: {weight} "layer{i}" stage=3' for i in range(num_layers)]
    lines += [f"input %x0: {rows}", f"tangent %t{num_layers}: {rows}"]
    for i in range(num_layers):
        lines.append(f"fwd %h{i}_0: {rows} = aten.mm.default(%x{i}, %w{i})")
        for j in range(NUM_ELEMENTWISE):
            out = f"x{i + 1}" if j == NUM_ELEMENTWISE - 1 else f"h{i}_{j + 1}"
            lines.append(f"fwd %{out}: {rows} = aten.tanh.default(%h{i}_{j})")
    for i in reversed(range(num_layers)):
        lines.append(f"bwd %v{i}: f32[{WIDTH}, {WIDTH} | 1, {WIDTH}] = aten.t.default(%w{i})")
        lines.append(f"bwd %t{i}: {rows} = aten.mm.default(%t{i + 1}, %v{i})")
        lines.append(f"bwd %u{i}: f32[{WIDTH}, {TOKENS} | 1, {WIDTH}] = aten.t.default(%x{i})")
        lines.append(f"bwd %g{i}: {weight} = aten.mm.default(%u{i}, %t{i + 1})")
    lines.append(f"return fwd output %x{num_layers}")
    lines += [f'return bwd grad "layer{i}" %g{i}' for i in range(num_layers)]
    lines.append('return bwd grad "x0" %t0')
    return parse_graph("\n".join(lines) + "\n")


def main(largest: Annotated[int, typer.Option(help="Nodes of the largest graph.")] = SIZES[-1]) -> None:
    """Time the scheduling pass."""
    table = Table("nodes", "collectives", "schedule s", "us a node", "gap to the bound", title_justify="left")
    before = parse_recipe(RECIPES[3].split(",schedule")[0])
    for size in SIZES:
        if size > largest:
            break
        graph = before.run(synthetic(size // (NUM_ELEMENTWISE + 11) + 1), CONTEXT, [])
        began = time.process_time()
        scheduled = Schedule().run(graph, CONTEXT)
        taken = time.process_time() - began
        num_nodes = len(scheduled.nodes)
        starts = sum(n.op.endswith("_start") for n in scheduled.nodes)
        gap = simulate(make_plan(scheduled), CONTEXT.costs, {}).step_us / lower_bound_us(scheduled, CONTEXT) - 1
        table.add_row(f"{num_nodes:,}", str(starts), f"{taken:.2f}", f"{1e6 * taken / num_nodes:.0f}", f"{gap:.1%}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
