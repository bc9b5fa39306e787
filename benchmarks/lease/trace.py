"""A step as torch's profiler sees it: how long the device idles, and how often the host waits for it."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

MARK = "lease step"
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "hipStreamSynchronize")


@dataclass(frozen=True)
class Traced:
    """A step.

    Args:
        idle_share: of the time from its first kernel to its last, in which no stream has work.
        num_kernels: launched.
        num_copies: between memories, and fills.
        num_waits: of the host for the device, from the beginning of the step until it is launched.
        waits: their names.
        span_us: from its first kernel's beginning to its last's end.
    """

    idle_share: float
    num_kernels: int
    num_copies: int
    num_waits: int
    waits: tuple[str, ...]
    span_us: float


def traced(step: Callable[[], Any], path: Path) -> Traced:
    """Trace a step into a file, packed by gzip."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        with record_function(MARK):
            step()
        torch.cuda.synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    with gzip.open(path, "rt") as file:
        return of_events(json.load(file)["traceEvents"])


def of_events(events: Sequence[dict[str, Any]]) -> Traced:
    """The step among the events of a trace.

    Raises:
        ValueError: the trace has no step, or the device did nothing in it.
    """
    timed = [event for event in events if event.get("ph") == "X"]
    mark = next((e for e in timed if e["name"] == MARK and e.get("cat") == "user_annotation"), None)
    work = [event for event in timed if event.get("cat") in ON_DEVICE]
    if mark is None or not work:
        raise ValueError("the trace has no work of the device: the profiler may lack CUPTI")
    begin, end = mark["ts"], mark["ts"] + mark["dur"]
    waits = [e["name"] for e in timed if e["name"] in WAITS and begin <= e["ts"] <= end]
    spans = [(event["ts"], event["ts"] + event["dur"]) for event in work]
    span_us = max(last for _, last in spans) - min(first for first, _ in spans)
    num_kernels = sum(event["cat"] == "kernel" for event in work)
    idle = 1 - _covered(spans) / span_us if span_us else 0.0
    return Traced(idle, num_kernels, len(work) - num_kernels, len(waits), tuple(sorted({*waits})), span_us)


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union."""
    total, reached = 0.0, float("-inf")
    for first, last in sorted(spans):
        total += max(last - max(first, reached), 0.0)
        reached = max(reached, last)
    return total
