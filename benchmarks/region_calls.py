"""The host's time for a call of a region, by Inductor and by AOTInductor: python -m benchmarks.region_calls

A region is called by the Python code that Inductor writes for it. AOTInductor writes C++ in its place, which is one
call from Python (`torch._inductor.aot_compile`). The region is a norm, a gate and three products of a few numbers, so
that kernels take next to nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks.results import write
from zgraph.bridge import private_inductor
from zgraph.bridge.private_inductor import Example

aten: Any = torch.ops.aten
Run = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]


def region(
    x: torch.Tensor, w: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, rest: torch.Tensor, bias: torch.Tensor
) -> list[torch.Tensor]:
    """The region: three results."""
    normed = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w
    hidden = torch.nn.functional.silu(aten.mm(normed, gate)) * aten.mm(normed, up)
    return [hidden, normed, aten.addmm(bias, hidden, gate.t()) + rest]


def ahead_of_time(inputs: list[torch.Tensor]) -> Run:
    """The region by AOTInductor: a call of C++."""
    with torch.no_grad():
        traced = make_fx(region, tracing_mode="fake")(*inputs)
    path = torch._inductor.aot_compile(traced, tuple(inputs))
    run: Run = torch._C._aoti.AOTIModelContainerRunnerCpu(path, 1).run
    return run


def measured(rounds: int, calls: int) -> dict[str, float]:
    """Microseconds of CPU time of a call, of the fastest turn of each."""
    inputs = [torch.randn(size) for size in ((2, 8), (8,), (8, 8), (8, 8), (2, 8), (8,))]
    wrapper: Run = private_inductor.inductor(region, [Example.of(t) for t in inputs])
    wrapper(list(inputs))
    ways: dict[str, Run] = {
        "eager": lambda args: region(*args),
        "Inductor": private_inductor.direct(wrapper),
        "AOTInductor": ahead_of_time(inputs),
    }
    for run in ways.values():
        for one, other in zip(run(list(inputs)), region(*inputs), strict=True):
            torch.testing.assert_close(one, other)
    found = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, run in ways.items():
            began = time.thread_time()
            for _ in range(calls):
                run(list(inputs))
            found[name] = min(found[name], 1e6 * (time.thread_time() - began) / calls)
    return found


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each.")] = 15,
    calls: Annotated[int, typer.Option(min=1, help="Calls a turn.")] = 200,
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the results to.")] = None,
) -> None:
    """Time the region, and print what a call of it takes."""
    torch.set_num_threads(1)
    found = measured(rounds, calls)
    for name, us in found.items():
        print(f"{name}: {us:.1f} us a call")
    write(json_file, call_us=found)


if __name__ == "__main__":
    typer.run(main)
