"""The host's time for a call of a region, by Inductor and by AOTInductor: python -m benchmarks.region_calls

A region is called by the Python code that Inductor writes for it. AOTInductor writes C++ in its place, which is one
call from Python (`torch._inductor.aot_compile`). Both are given the regions of a tiny Llama, in turns.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.fx.experimental.proxy_tensor import make_fx

import zgraph
from benchmarks.host_time import llama
from benchmarks.results import write
from zgraph.bridge import private_inductor
from zgraph.bridge.private_inductor import Example

Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Row:
    """One region.

    num_ops: ops in it; num_inputs, num_outputs: tensors that a call is given, and gives.
    wrapper_us, runner_us: the fastest mean of a turn, by Inductor's wrapper and by AOTInductor's runner.
    runner_seconds: what AOTInductor took to compile it.
    """

    num_ops: int
    num_inputs: int
    num_outputs: int
    wrapper_us: float
    runner_us: float
    runner_seconds: float


def regions_of(layers: int) -> list[tuple[Callable[..., Any], list[Example]]]:
    """The different regions of a step, as functions of tensors with examples."""
    found: list[tuple[Callable[..., Any], list[Example]]] = []
    own = private_inductor.lowered

    def lowered(function: Callable[..., Any], examples: Any, **options: Any) -> Any:
        found.append((function, list(examples)))
        return own(function, examples, **options)

    torch.manual_seed(0)
    ids = torch.zeros(1, 2, dtype=torch.int64)
    with patch.object(private_inductor, "lowered", lowered):
        model: Any = zgraph.compile(llama(layers), stage=0, kernels="inductor")
        model(input_ids=ids, labels=ids).loss.backward()
    return found


def made(example: Example) -> torch.Tensor:
    tensor = torch.empty_strided(example.size, example.stride, dtype=example.dtype)
    return tensor.uniform_() if tensor.is_floating_point() else tensor.zero_()


def runner(function: Callable[..., Any], inputs: list[torch.Tensor]) -> Callable[[list[torch.Tensor]], Tensors]:
    """The region by AOTInductor: a call of C++."""
    with torch.no_grad():
        traced = make_fx(function)(*inputs)
    path = torch._inductor.aot_compile(traced, tuple(inputs))
    container = torch._C._aoti.AOTIModelContainerRunnerCpu(path, 1)
    run: Callable[[list[torch.Tensor]], Tensors] = container.run
    return run


def measured(layers: int, most: int, rounds: int, calls: int) -> list[Row]:
    """The regions with the most inputs, each in turns of both."""
    rows = []
    for function, examples in sorted(regions_of(layers), key=lambda pair: -len(pair[1]))[:most]:
        inputs = [made(e) for e in examples]
        wrapper = private_inductor.inductor(function, examples)
        wrapper(list(inputs))
        wrapper = private_inductor.direct(wrapper)
        began = time.perf_counter()
        ahead = runner(function, inputs)
        seconds = time.perf_counter() - began
        for one, other in zip(wrapper(list(inputs)), ahead(list(inputs)), strict=True):
            torch.testing.assert_close(one, other)
        times = {"wrapper": float("inf"), "runner": float("inf")}
        for _ in range(rounds):
            for name, run in (("wrapper", wrapper), ("runner", ahead)):
                start = time.thread_time()
                for _ in range(calls):
                    run(list(inputs))
                times[name] = min(times[name], 1e6 * (time.thread_time() - start) / calls)
        traced = make_fx(function)(*inputs)
        num_ops = sum(n.op == "call_function" for n in traced.graph.nodes)
        outputs = wrapper(list(inputs))
        rows.append(Row(num_ops, len(inputs), len(outputs), times["wrapper"], times["runner"], seconds))
    return rows


def main(
    layers: Annotated[int, typer.Option(min=1, help="Layers of the model.")] = 2,
    most: Annotated[int, typer.Option(min=1, help="How many regions, those with the most inputs first.")] = 5,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each.")] = 7,
    calls: Annotated[int, typer.Option(min=1, help="Calls a turn.")] = 300,
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the results to.")] = None,
) -> None:
    """Time the regions, and print what a call of each takes."""
    os.environ.setdefault("ZGRAPH_LOGS", "none")
    torch.set_num_threads(1)
    rows = measured(layers, most, rounds, calls)
    table = Table(title="one call of a region, CPU time of its thread", title_justify="left")
    for column in ("ops", "inputs", "outputs", "Inductor's wrapper us", "AOTInductor us", "compiled in s"):
        table.add_column(column, justify="right")
    for row in rows:
        times = f"{row.wrapper_us:.1f}", f"{row.runner_us:.1f}", f"{row.runner_seconds:.0f}"
        table.add_row(str(row.num_ops), str(row.num_inputs), str(row.num_outputs), *times)
    total = [sum(times) for times in zip(*((r.wrapper_us, r.runner_us) for r in rows), strict=True)]
    table.add_row("", "", "all", *(f"{us:.1f}" for us in total), "")
    Console(width=100).print(table)
    write(json_file, rows=[asdict(row) for row in rows])


if __name__ == "__main__":
    typer.run(main)
