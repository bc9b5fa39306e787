"""The machine: its versions, what it computes and copies in a second, and whether `zgraph.profile_machine` finds that.

Here the host's clock goes around many launches; `profile_machine` reads the device's events.
"""

from __future__ import annotations

import mmap
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from ctypes import addressof, c_char
from typing import Any

import torch
import triton

from benchmarks.lease.results import Emit

NEAR = 0.8, 1.25
"""Ratios that pass, of a rate that `profile_machine` finds to the one found here."""

NUM_LAUNCHES = 20
NUM_TINY = 500


def run(emit: Emit, small: bool) -> None:
    """Versions, rates, and those of the profile beside them."""
    _versions(emit)
    size, copied, pinned = (64, 1 << 16, 1 << 16) if small else (8192, 4 << 30, 1 << 30)
    with emit.trying("register host memory"):
        emit("register host memory", _register_ms(pinned), f"ms for {pinned >> 20} MiB")
    with emit.trying("copies of pinned memory"):
        _copies(emit, pinned)
    rates: dict[str, float] = {}
    for name, dtype in (("bf16", torch.bfloat16), ("f32", torch.float32)):
        with emit.trying(f"matmul {name}"):
            rates[name] = _multiplied(size, dtype)
            emit(f"matmul {name}", rates[name] / 1e12, "TFLOP/s")
    with emit.trying("copy on the device"):
        rates["memory"] = _copied(copied)
        emit("copy on the device", rates["memory"] / 1e9, "GB/s, read and written")
    with emit.trying("launch"):
        tiny = torch.zeros(1, device="cuda")
        emit("launch", _launch_us(tiny), "us of the host")
    torch.cuda.empty_cache()
    with emit.trying("profile_machine"):
        _profile(emit, rates, small)


def _versions(emit: Emit) -> None:
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    for name, version in {**versions, "cuda": torch.version.cuda, "hip": torch.version.hip}.items():
        emit(name, version)
    properties = torch.cuda.get_device_properties(0)
    emit("device", properties.name, memory_bytes=properties.total_memory, units=properties.multi_processor_count)
    emit("host", platform.processor() or platform.machine(), num_cores=os.cpu_count())
    command = shutil.which("nvidia-smi")
    if command is not None:
        query = "--query-gpu=driver_version,clocks.max.sm,clocks.sm,power.limit,pcie.link.gen.current,mig.mode.current"
        done = subprocess.run([command, query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20)
        emit("nvidia-smi", done.stdout.strip() or done.stderr.strip())
    began = time.perf_counter()
    with emit.trying("import zgraph"):
        import zgraph.api  # noqa: F401

        emit("import zgraph", time.perf_counter() - began, "s, after torch")


def _register_ms(num_bytes: int) -> float:
    """Milliseconds to pin memory that the host has written to."""
    block = mmap.mmap(-1, num_bytes)
    torch.frombuffer(block, dtype=torch.uint8).fill_(1)
    address = addressof(c_char.from_buffer(block))
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    began = time.perf_counter()
    code = runtime.cudaHostRegister(address, num_bytes, 0)
    seconds = time.perf_counter() - began
    if int(code) != 0:
        raise RuntimeError(f"cudaHostRegister gives {code}")
    runtime.cudaHostUnregister(address)
    return 1e3 * seconds


def _copies(emit: Emit, num_bytes: int) -> None:
    """From and to pinned memory, one way and both ways at once."""
    on_host = [torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    on_device = [torch.zeros(num_bytes, dtype=torch.uint8, device="cuda") for _ in range(2)]
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def to_device() -> None:
        on_device[0].copy_(on_host[0], non_blocking=True)

    def to_host() -> None:
        on_host[1].copy_(on_device[1], non_blocking=True)

    def both() -> None:
        to_device()
        with torch.cuda.stream(side):
            to_host()

    for name, copy, count in (("host to device", to_device, 1), ("device to host", to_host, 1), ("both ways", both, 2)):
        emit(name, count * num_bytes / _seconds(copy, 4) / 1e9, "GB/s, pinned")


def _multiplied(size: int, dtype: torch.dtype) -> float:
    """FLOP a second of a square matmul."""
    a = torch.randn(size, size, device="cuda").to(dtype)
    return 2 * size**3 / _seconds(lambda: a @ a)


def _copied(num_bytes: int) -> float:
    """Bytes a second, read and written."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * num_bytes / _seconds(lambda: target.copy_(source))


def _profile(emit: Emit, rates: dict[str, float], small: bool) -> None:
    """Rates of the profile, over those found before."""
    import zgraph

    profile = zgraph.profile_machine(emit.folder / "this-machine.json").device
    emit("profile_machine", profile.launch_us, "us a launch", matmul_flops=dict(profile.matmul_flops))
    said = {"memory": profile.memory_bytes_per_s, **profile.matmul_flops}
    for name, rate in rates.items():
        ratio = said[name] / rate
        emit(f"profile_machine, {name}", ratio, "of the rate above", ok=None if small else NEAR[0] < ratio < NEAR[1])


def _seconds(launch: Callable[[], Any], num_launches: int = NUM_LAUNCHES) -> float:
    """Seconds of one of many launches, by the host's clock."""
    for _ in range(2):
        launch()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(num_launches):
        launch()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / num_launches


def _launch_us(tiny: torch.Tensor) -> float:
    """Microseconds of the host for one launch, which it does not wait for."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(NUM_TINY):
        tiny.add_(1.0)
    took = time.perf_counter() - began
    torch.cuda.synchronize()
    return 1e6 * took / NUM_TINY
