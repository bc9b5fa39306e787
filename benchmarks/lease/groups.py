"""Fused groups beside torch.compile, with caches that are cold: what tuning has to choose from."""

from __future__ import annotations

import gc
from statistics import median

import torch

from benchmarks import contenders
from benchmarks.clock import Clock, compare
from benchmarks.groups import Group, groups
from benchmarks.lease.results import Emit

SYSTEMS = ("torch.compile", "zgraph triton", "zgraph inductor", "eager", "torch linear_cross_entropy")
SMALL_SYSTEMS = ("eager", "zgraph triton")
FIRST = ("linear + cross-entropy", "residual + rmsnorm", "swiglu mlp", "rotary", "swiglu")
"""Llama's, in this order; then the others."""

NUM_WARMUPS, NUM_ROUNDS, NUM_STEPS = 3, 2, 10
LIMIT = 3e-2
"""How far results may be from those of the first system, relative: bf16."""

LAST_S = 15.0
"""Groups are not begun later than so many seconds before the end."""


def run(emit: Emit, small: bool) -> None:
    """Each system at each group is a result."""
    device = torch.device("cuda")
    found = sorted(groups(is_tiny=small), key=_place)
    clock = Clock(device, is_cold=True)
    for group in found[1:2] if small else found:
        title = f"{group.name}, {group.shape.model}"
        if f"{title}: {SYSTEMS[0]}" in emit.done:
            continue
        if emit.left_s < LAST_S:
            emit(title, note="left out: the time is over")
            continue
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
        with emit.trying(title):
            _compare(emit, title, group, clock, SMALL_SYSTEMS if small else SYSTEMS)


def _place(group: Group) -> int:
    return FIRST.index(group.name) if group.name in FIRST else len(FIRST)


def _compare(emit: Emit, title: str, group: Group, clock: Clock, systems: tuple[str, ...]) -> None:
    prepares = contenders.of_group(group, clock.device)
    wanted = {name: prepares[name] for name in systems if name in prepares}
    found = compare(wanted, clock, NUM_WARMUPS, NUM_ROUNDS, NUM_STEPS)
    first = next((median(taken.seconds) for taken in found.values() if not taken.error), None)
    for name, taken in found.items():
        if taken.error is not None:
            is_ours = name.startswith("zgraph")  # this torch may lack one of its own ways
            emit(f"{title}: {name}", ok=False if is_ours else None, error=taken.error)
            continue
        seconds = median(taken.seconds)
        emit(
            f"{title}: {name}",
            1e3 * seconds,
            "ms",
            ok=None if taken.difference is None else taken.difference <= LIMIT,
            over_first=seconds / first if first else None,
            host_ms=1e3 * (taken.host_s or 0.0),
            peak_bytes=taken.peak_bytes,
            differs=taken.difference,
        )
