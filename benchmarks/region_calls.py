"""The host's time for a call of a region, by Inductor and by AOTInductor: python -m benchmarks.region_calls

A region is called by the Python code that Inductor writes for it, or with `regions="c++"` as a library that AOTInductor
makes, which is one call from Python. The region is a norm, a gate and three products of a few numbers, so that kernels
take next to nothing. What compiling it takes is processor time, that of the compiler of C++ included.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.results import write
from zgraph.bridge import private_aot, private_inductor
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


def small() -> list[torch.Tensor]:
    """Inputs of the region."""
    return [torch.randn(size) for size in ((2, 8), (8,), (8, 8), (8, 8), (2, 8), (8,))]


def by_inductor(inputs: list[torch.Tensor]) -> Run:
    """The region by Inductor, called from Python."""
    wrapper: Run = private_inductor.inductor(region, [Example.of(t) for t in inputs])
    wrapper(list(inputs))
    return private_inductor.direct(wrapper)


def as_library(inputs: list[torch.Tensor]) -> Run:
    """The region as a library."""
    return private_aot.loaded(private_aot.Region(region, [Example.of(t) for t in inputs]).build()())


def compiled() -> tuple[dict[str, Run], dict[str, float]]:
    """Ways to call the region, and the seconds of processor time that compiling takes for each.

    A first region is compiled before, which takes what a process and a machine take once.
    """
    ways: dict[str, Run] = {"eager": lambda args: region(*args)}
    seconds = {}
    for name, compiles in (("Inductor", by_inductor), ("AOTInductor", as_library)):
        compiles([t.double() for t in small()])
        began = os.times()
        ways[name] = compiles(small())
        ended = os.times()
        seconds[name] = sum(ended[:4]) - sum(began[:4])
    return ways, seconds


def measured(ways: dict[str, Run], rounds: int, calls: int) -> dict[str, float]:
    """Microseconds of CPU time of a call, of the fastest turn of each."""
    inputs = small()
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
    ways, seconds = compiled()
    found = measured(ways, rounds, calls)
    for name, us in found.items():
        print(f"{name}: {us:.1f} us a call" + (f", compiled in {seconds[name]:.1f} s" if name in seconds else ""))
    write(json_file, call_us=found, compile_s=seconds)


if __name__ == "__main__":
    typer.run(main)
