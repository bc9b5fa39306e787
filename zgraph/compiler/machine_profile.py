"""Profile of one device of this machine, measured: `zgraph.profile_machine`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from zgraph.bridge.target import cost_table
from zgraph.cost import Hardware
from zgraph.cost.hardware import THIS_MACHINE, save, this_machine_path
from zgraph.runtime.clock import Clock

SIZE, SMALL_SIZE = 1024, 1024
"""Rows and columns of the matrices that are multiplied: on a processor, and on a GPU to see how much slower a small
matmul is."""

SIZES_ON_DEVICE = (8192, 4096, 2048)
"""Those on a GPU: the first that there is room for."""

COPY_BYTES, COPY_BYTES_ON_DEVICE = 1 << 27, 2 << 30
"""Bytes that are copied; on a GPU at most an eighth of its free memory."""

NUM_ROUNDS, NUM_WARMUPS = 7, 2
NUM_IN_A_ROW = 10
"""Launches on a GPU between two looks at its clock."""

NUM_TINY = 200

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
DEVICE_DTYPES = {**DTYPES, "f16": torch.float16, "f8e4m3": torch.float8_e4m3fn}

MOST_S = 2.0
"""A measurement that would take longer than this is taken once: a GPU may compute in a dtype without units for it."""


def profile_machine(path: str | Path | None = None) -> Hardware:
    """Measure one device of this machine: matmul rates, memory bandwidth, the smallest op. Saved as `this-machine`.

    On a GPU its own events are the clock, so that what is measured is the device and not the host's launches; only
    `launch_us` is the host's time to launch an op. The links are those of the built-in profile: `zgraph.profile`
    measures them, where there are peers to send to.

    Args:
        path: where to save the profile instead.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no profile is this device's own: what it would say is measured here
        base = cost_table(None, device).hardware
    measured = _on_gpu(device) if on_gpu else _on_processor(device)
    found = base.model_copy(
        update={
            "name": THIS_MACHINE,
            "source": f"measured by zgraph.profile_machine; links as {base.name} has them",
            "device": base.device.model_copy(update=measured),
        }
    )
    save(found, Path(path) if path is not None else this_machine_path())
    return found


def _on_processor(device: torch.device) -> Mapping[str, Any]:
    clock = Clock(device, is_cold=False)
    rates = {}
    for name, dtype in DTYPES.items():
        a = torch.ones(SIZE, SIZE, dtype=dtype)
        rates[name] = 2 * SIZE**3 / _seconds(clock, partial(torch.matmul, a, a))
    source = torch.zeros(COPY_BYTES // 4)
    target = torch.empty_like(source)
    tiny = torch.zeros(1)
    return {
        "memory_bytes_per_s": 2 * COPY_BYTES / _seconds(clock, lambda: target.copy_(source)),
        "matmul_flops": rates,
        "launch_us": 1e6 * _seconds(clock, lambda: tiny.add_(1.0)),
    }


def _on_gpu(device: torch.device) -> Mapping[str, Any]:
    clock = Clock(device, is_cold=False)
    tiny = torch.zeros(1, device=device)
    clock.host_s(lambda: tiny.add_(1.0), NUM_TINY)
    free_bytes, memory_bytes = torch.cuda.mem_get_info(device)
    rates = {
        name: rate
        for name, dtype in DEVICE_DTYPES.items()
        if (rate := next(filter(None, (_rate(clock, dtype, size) for size in SIZES_ON_DEVICE)), None))
    }
    best = "bf16" if "bf16" in rates else "f32"
    small_rate = _rate(Clock(device, is_cold=True), DEVICE_DTYPES[best], SMALL_SIZE) or rates[best]
    small_flop = 2 * SMALL_SIZE**3
    source = torch.zeros(min(COPY_BYTES_ON_DEVICE, free_bytes // 8), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {
        "memory_bytes": memory_bytes,
        "memory_bytes_per_s": 2 * source.numel() / _seconds(clock, lambda: target.copy_(source)),
        "matmul_flops": rates,
        "matmul_half_flop": max(small_flop * rates[best] / small_rate - small_flop, 0.0),
        "launch_us": 1e6 * clock.host_s(lambda: tiny.add_(1.0), NUM_TINY),
    }


def _rate(clock: Clock, dtype: torch.dtype, size: int) -> float | None:
    """FLOP a second of a square matmul of random numbers, as zeros or ones take less power; None where none runs."""
    dice = torch.Generator(clock.device).manual_seed(0)
    try:
        numbers = torch.randn(size, size, device=clock.device, generator=dice)
        a = numbers.to(dtype)
        if dtype.itemsize == 1:
            one = torch.ones((), device=clock.device)
            seconds = _seconds(clock, lambda: torch._scaled_mm(a, a.t(), one, one, out_dtype=torch.bfloat16))
            return 2 * size**3 / seconds
        return 2 * size**3 / _seconds(clock, lambda: a @ a)
    except RuntimeError:  # this GPU has no such matmul, or no room for one
        return None


def _seconds(clock: Clock, run: Callable[[], Any]) -> float:
    """The median time of one run, after two to warm up."""
    count = NUM_IN_A_ROW if clock.on_device else 1
    for _ in range(NUM_WARMUPS):
        host_s = clock.host_s(run)
    once = clock.seconds(run, 1)[0]
    num_rounds = NUM_ROUNDS if once * count * NUM_ROUNDS < MOST_S else 1
    return median(clock.seconds(run, num_rounds, host_s, count))
