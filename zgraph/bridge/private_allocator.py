"""Requests to torch's allocator on processors, a private corner of torch. Tried on torch 2.13.0.

The older of torch's profilers is the one here: it starts in microseconds, sees one thread alone, and prints nothing.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch.autograd import (  # type: ignore[attr-defined]
    ProfilerConfig,
    ProfilerState,
    _disable_profiler_legacy,
    _enable_profiler_legacy,
)

__all__ = ["in_own_thread", "requested_bytes"]


def requested_bytes(call: Callable[[], Any]) -> tuple[int, int]:
    """The most bytes that a call has from the allocator at once, and those that its results hold when it is over.

    What other threads ask for is not seen.
    """
    options = torch._C._profiler._ExperimentalConfig()
    collects = gc.isenabled()
    gc.disable()  # what it finds would be taken for what the call gives back
    _enable_profiler_legacy(ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, options))
    try:
        made = call()
    finally:
        events: list[Any] = [event for thread in _disable_profiler_legacy() for event in thread]
        if collects:
            gc.enable()
    del made
    levels = [0, *accumulate(event.cpu_memory_usage() for event in events if event.kind() == "memory_alloc")]
    return max(levels), levels[-1]


def in_own_thread(work: Callable[[], Any]) -> Any:
    """Result of a call in a thread of its own: the caller's modes and profilers, and autograd, are not in force there.

    Raises:
        BaseException: what the call raises.
    """
    found: list[Any] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            with torch.no_grad():
                found.append(work())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="zgraph-scratch")
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
    return found[0]
