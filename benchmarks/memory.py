"""Bytes live on one rank, from the allocator's own count. Never resident memory, which keeps what was freed.

What is counted is every block that torch's allocator handed out and has not taken back, on any thread:
parameters, optimizer state, activations, and the buckets and flat buffers that a system keeps for itself.
What a communication library takes from elsewhere is not seen.

  at rest  after an optimizer step and zero_grad(set_to_none=True)
  peak     the highest level during one whole step that starts and ends at rest

On CUDA the caching allocator keeps both. On CPU the allocator keeps a sum once a flag of its own is set, and
shows it in the profiler's trace, in one event for each block handed out or taken back.
"""

from __future__ import annotations

import ctypes
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.errors import CannotCount

Prepare = Callable[[], Callable[[int], Tensor]]
"""Builds something that trains, and returns its training step, which takes the number of the step."""

CPU_SUM_FLAG = "FLAGS_caffe2_report_cpu_memory_usage"
"""In libc10 (c10/core/CPUAllocator.cpp; tried on torch 2.13). Without it the sum leaves out what threads
other than the profiled one allocate and free, as gloo's do."""


@dataclass(frozen=True)
class MemoryEvent:
    """A block handed out (num_bytes > 0) or taken back (num_bytes < 0), and the sum after it."""

    time_us: float
    num_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class LiveBytes:
    """Bytes live on one rank."""

    rest_bytes: int
    peak_bytes: int


def live_bytes(events: Sequence[MemoryEvent]) -> LiveBytes:
    """The level before the first of the events of one step, and the highest level in it.

    >>> live_bytes([MemoryEvent(1, 40, 140), MemoryEvent(2, -100, 40), MemoryEvent(3, 60, 100)])
    LiveBytes(rest_bytes=100, peak_bytes=140)
    """
    first = min(events, key=lambda event: event.time_us)
    rest_bytes = first.total_bytes - first.num_bytes
    return LiveBytes(rest_bytes, max(rest_bytes, max(event.total_bytes for event in events)))


def measure(prepare: Prepare, *, warmup: int, device: torch.device) -> LiveBytes:
    """Build something that trains, take `warmup` steps, and measure the step after them.

    Nothing may have been built before in this process. Raises CannotCount if the allocator keeps no sum.
    """
    if device.type == "cpu":
        _keep_cpu_sum()
    step = prepare()
    for index in range(warmup):
        step(index)
    return (_watch_cuda if device.type == "cuda" else _watch_cpu)(lambda: step(warmup))


def _watch_cuda(step: Callable[[], Tensor]) -> LiveBytes:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    rest_bytes: int = torch.cuda.memory_stats()["allocated_bytes.all.current"]
    step()
    torch.cuda.synchronize()
    return LiveBytes(rest_bytes, torch.cuda.memory_stats()["allocated_bytes.all.peak"])


def _watch_cpu(step: Callable[[], Tensor]) -> LiveBytes:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        trace: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return live_bytes(
        [
            MemoryEvent(event["ts"], event["args"]["Bytes"], event["args"]["Total Allocated"])
            for event in trace
            if event["name"] == "[memory]"
        ]
    )


def _keep_cpu_sum() -> None:
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libc10.so"))
        ctypes.c_bool.in_dll(library, CPU_SUM_FLAG).value = True
    except (OSError, ValueError) as error:
        raise CannotCount(f"torch {torch.__version__} has no {CPU_SUM_FLAG}", "Use --no-memory") from error
