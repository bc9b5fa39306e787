"""Whole steps of a Llama of 1B parameters, one system after the other, each with a trace of one step."""

from __future__ import annotations

import gc
from dataclasses import asdict
from statistics import median

import torch

from benchmarks import contenders
from benchmarks.clock import Clock, Step
from benchmarks.lease.results import Emit
from benchmarks.lease.trace import traced

SYSTEMS = ("torch.compile", "zgraph auto", "zgraph inductor", "zgraph aten", "zgraph triton", "eager")
SMALL_SYSTEMS = ("zgraph aten", "eager")
"""An emulated device runs nothing of Inductor's."""

BATCH, TOKENS = 4, 2048
NUM_WARMUPS, NUM_STEPS = 3, 10

LIMIT = 3e-2
"""How far losses may be from the first system's, relative: they are computed in bf16."""

LAST_S = 15.0
"""Systems are not begun later than so many seconds before the end."""


def run(emit: Emit, small: bool) -> None:
    """Each system is a result, and its trace another."""
    device = torch.device("cuda")
    batch, tokens = (2, 16) if small else (BATCH, TOKENS)
    prepares = contenders.of_training(batch, tokens, device, is_tiny=small)
    first: list[float] = []
    for name in SMALL_SYSTEMS if small else SYSTEMS:
        if name in emit.done:
            continue
        if emit.left_s < LAST_S:
            emit(name, note="left out: the time is over")
            continue
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
        with emit.trying(name):
            before = torch.cuda.memory_allocated()
            step = prepares[name]()
            _measure(emit, name, step, before, first)
            if not small:
                found = traced(step, emit.folder / "traces" / f"{name.replace(' ', '-')}.json.gz")
                ok = found.num_waits == 0 if name.startswith("zgraph") else None
                emit(f"{name}, trace", found.idle_share, "of the step idle", ok=ok, **asdict(found))
            del step


def _measure(emit: Emit, name: str, step: Step, before: int, first: list[float]) -> None:
    """Time a system. `first` has the loss and the seconds of the first, once there are any."""
    for _ in range(NUM_WARMUPS):
        step()
    clock = Clock(torch.device("cuda"), is_cold=False)
    host_s = min(clock.host_s(step) for _ in range(2))
    torch.cuda.reset_peak_memory_stats()
    seconds = median(clock.seconds(step, NUM_STEPS, host_s))
    peak_bytes = torch.cuda.max_memory_allocated() - before
    (loss,) = (float(result) for result in step.results())
    if not first:
        first += [loss, seconds]
    emit(
        name,
        1e3 * seconds,
        "ms",
        ok=abs(loss - first[0]) <= LIMIT * abs(first[0]),
        over_first=seconds / first[1],
        host_ms=1e3 * host_s,
        peak_bytes=peak_bytes,
        loss=loss,
    )
