"""NCCL as the runtime calls it, on a group of one rank: grouped calls, a barrier, and an abort from another thread."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from benchmarks.lease.results import Emit
from zgraph.bridge import private_runtime

NUM_ELEMENTS = 1 << 20
SLEEP_CYCLES = 6_000_000_000
"""Of the stream before a collective that is aborted: some 3 s."""

ABORT_LIMIT_S = 30.0

NAMES: dict[str, tuple[str, ...]] = {
    "all-gather": ("all_gather_single", "all_gather_into_tensor"),
    "reduce-scatter": ("reduce_scatter_single", "reduce_scatter_tensor"),
}
GROUPED: dict[str, tuple[str, ...]] = {
    "grouped all-gathers": ("all_gather_single_coalesced", "allgather_into_tensor_coalesced"),
    "grouped reduce-scatters": ("reduce_scatter_single_coalesced", "reduce_scatter_tensor_coalesced"),
    "abort": ("abort",),
}
"""Calls of the runtime, by one of these names: the first since torch 2.13, the second before."""


def run(emit: Emit, small: bool) -> None:
    """The names; and on a GPU the calls."""
    for what, names in NAMES.items():
        _named(emit, what, dist, names)
    for what, names in GROUPED.items():
        _named(emit, what, dist.ProcessGroup, names)
    if small:
        return
    _named(emit, "start and end of a group", dist.ProcessGroupNCCL, ("_group_start",))
    emit("NCCL", ".".join(map(str, torch.cuda.nccl.version())))  # type: ignore[no-untyped-call]
    torch.cuda.set_device(0)
    began = time.perf_counter()
    with emit.trying("init"):
        private_runtime.init_group("nccl", HashStore(), 0, 1, None)
        emit("init", time.perf_counter() - began, "s", ok=private_runtime.has_averages(_group()))
    for count in (1, 3):
        with emit.trying(f"{count} at once"):
            _collectives(emit, count)
    with emit.trying("barrier"):
        dist.barrier()
        torch.cuda.synchronize()
        emit("barrier", ok=True)
    with emit.trying("abort of a group under way"):
        _abort(emit)


def _named(emit: Emit, what: str, owner: Any, names: tuple[str, ...]) -> None:
    found = next((name for name in names if hasattr(owner, name)), None)
    emit(f"name of {what}", found, ok=found is not None)


def _group() -> dist.ProcessGroup:
    group: dist.ProcessGroup = dist.group.WORLD  # type: ignore[assignment]
    return group


def _collectives(emit: Emit, count: int) -> None:
    """Gathers and reduce-scatters of so many tensors in one call: of one rank, they are copies."""
    for name in ("all-gather", "reduce-scatter"):
        given = [torch.randn(NUM_ELEMENTS * (i + 1), device="cuda").bfloat16() for i in range(count)]
        outs = [torch.full_like(tensor, float("nan")) for tensor in given]
        pairs = list(zip(outs, given, strict=True))
        began = time.perf_counter()
        if name == "all-gather":
            work = private_runtime.all_gathers(pairs, _group())
        else:
            work = private_runtime.reduce_scatters(pairs, _group(), None)
        launch_us = 1e6 * (time.perf_counter() - began)
        work.wait()
        torch.cuda.synchronize()
        emit(f"{name} of {count}", launch_us, "us of the host", ok=all(map(torch.equal, outs, given)))


def _abort(emit: Emit) -> None:
    """Another thread aborts the group while a collective waits behind a busy stream: nobody may hang.

    The collective of one rank would end by itself once the stream has slept, so that a time is what is looked at.
    """
    tensor = torch.ones(NUM_ELEMENTS, device="cuda")
    torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
    work = dist.all_reduce(tensor, async_op=True)
    thread = threading.Thread(target=private_runtime.abort_groups, args=(0,), daemon=True)
    began = time.perf_counter()
    thread.start()
    thread.join(ABORT_LIMIT_S)
    seconds = time.perf_counter() - began
    emit("abort of a group under way", seconds, "s", ok=not thread.is_alive())
    began = time.perf_counter()
    said = ""
    try:
        work.wait()
        torch.cuda.synchronize()
    except RuntimeError as error:
        said = str(error).strip().splitlines()[0]
    emit("wait after an abort", time.perf_counter() - began, "s", ok=True, said=said)
