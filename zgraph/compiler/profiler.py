"""Costs of a compiled model on the devices and the network at hand, measured, the same on all ranks."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import nn

from zgraph.compiler.compiled_model import compiled_model
from zgraph.cost import AlphaBeta, CostTable, save_table, signature
from zgraph.errors import UsageError
from zgraph.runtime import Session
from zgraph.runtime.clock import Clock
from zgraph.runtime.collectives import exchange
from zgraph.runtime.recorder import Recorder

SIZES = (1 << 14, 1 << 20, 1 << 22)
DEVICE_SIZES = (1 << 14, 1 << 26, 1 << 28)
"""Bytes of the wholes that collectives are measured with, between processors and between GPUs. The smallest shows the
latency, the largest two the rate: there NCCL uses the protocol that a layer's gathers use."""

NUM_IN_A_ROW, NUM_IN_A_ROW_ON_DEVICE = 4, 10
NUM_WARMUPS = 2
_COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce")

Points = list[tuple[float, float]]
"""For each size of a collective the bytes that a rank sends, and microseconds."""


def profile(
    model: nn.Module, step: Callable[[], Any], *, num_steps: int = 5, path: str | Path | None = None
) -> CostTable:
    """Measure a compiled model's ops and collectives. All ranks must call it, and get the same table.

    Compile a new model with `zgraph.compile(model, hardware=table)` (or the file's path) to have it planned with what
    was measured.

    Args:
        model: a compiled model.
        step: one training step of it: forward and backward, no optimizer. It is run `num_steps` + 2 times.
        num_steps: steps that are measured; means are taken over them, and over the ranks.
        path: where to save the table as JSON, if anywhere. The first rank writes it.

    Raises:
        UsageError: the model is not compiled, or the step did not run it.
    """
    compiled = compiled_model(model)
    session = compiled.session
    for _ in range(NUM_WARMUPS):
        step()
    recorder = session.recorder = Recorder(session.device)
    try:
        for _ in range(num_steps):
            step()
    finally:
        session.recorder = None
    ops = _ops_us(recorder, compiled.hints)
    if not ops:
        raise UsageError("the step given to zgraph.profile did not run the model; it must call it, and .backward()")
    transfers = _transfers(session, num_steps)
    if session.num_ranks > 1:
        ops, transfers = _agreed(session, ops, transfers)
    lines = {kind: AlphaBeta(latency_us=us, bytes_per_s=rate) for kind, (us, rate) in _lines(transfers).items()}
    hardware = compiled.context.costs.hardware.model_copy(update={"overlap_slowdown": 1.0})  # it is in the ops' times
    table = compiled.context.costs.model_copy(update={"hardware": hardware, "ops": ops, "transfers": lines})
    if path is not None and session.store.rank == 0:
        save_table(table, Path(path))
    return table


def _ops_us(recorder: Recorder, hints: Mapping[str, int]) -> dict[str, float]:
    """Microseconds by signature: the mean over the nodes that share it, some of which run beside a transfer."""
    found: dict[str, list[float]] = defaultdict(list)
    for node, us in recorder.means_us():
        if node.op not in ("wait", "release"):
            found[signature(node, hints)].append(us)
    return {key: mean(values) for key, values in sorted(found.items())}


def _transfers(session: Session, num_rounds: int) -> dict[str, Points]:
    """For each kind of collective what its sizes take on this rank."""
    if session.num_ranks == 1:
        return {}
    ranks, shards = session.num_ranks, session.num_shards
    shares = {
        "all_gather": (shards - 1) / shards,
        "reduce_scatter": (shards - 1) / shards + 2 * (ranks - shards) / (ranks * shards),
        "all_reduce": 2 * (ranks - 1) / ranks,
    }
    sizes = SIZES if session.device.type == "cpu" else DEVICE_SIZES
    take = _host_us if session.device.type == "cpu" else _device_us(session.device)
    return {
        kind: [(size * shares[kind], take(session, kind, size, num_rounds)) for size in sizes] for kind in _COLLECTIVES
    }


def _host_us(session: Session, kind: str, num_bytes: int, num_rounds: int) -> float:
    """Microseconds of a collective between processors, by the clock on the wall."""
    run = exchange(kind, session, num_bytes // 4, NUM_IN_A_ROW)
    taken = []
    for _ in range(num_rounds + NUM_WARMUPS):
        session.synchronize()
        begin = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begin)
    return 1e6 * median(taken[NUM_WARMUPS:]) / NUM_IN_A_ROW


def _device_us(device: torch.device) -> Callable[[Session, str, int, int], float]:
    """Microseconds of a collective between GPUs, by events: without the time in which hosts launch it."""
    torch.cuda.empty_cache()  # of the steps before, which need not have left room
    clock = Clock(device, is_cold=True)

    def take(session: Session, kind: str, num_bytes: int, num_rounds: int) -> float:
        run = exchange(kind, session, num_bytes // 4, NUM_IN_A_ROW_ON_DEVICE)
        taken, host_s = [], 0.0
        for _ in range(num_rounds + NUM_WARMUPS):
            session.synchronize()
            taken += clock.seconds(run, 1, host_s)
            session.synchronize()
            host_s = clock.host_s(run)
        return 1e6 * median(taken[NUM_WARMUPS:]) / NUM_IN_A_ROW_ON_DEVICE

    return take


def _lines(transfers: Mapping[str, Points]) -> dict[str, tuple[float, float]]:
    """For each kind of collective its latency in microseconds and the bytes a rank sends in a second."""
    return {kind: _line(points) for kind, points in transfers.items()}


def _line(points: Points) -> tuple[float, float]:
    """Latency and rate through measured (bytes, us): the rate from the largest two, the latency from the smallest."""
    (small, small_us), (large, large_us) = points[-2:]
    us_per_byte = max((large_us - small_us) / (large - small), 1e-9)
    latency_us = max(points[0][1] - points[0][0] * us_per_byte, 0.0)
    return latency_us, 1e6 / us_per_byte


def _agreed(
    session: Session, ops: dict[str, float], transfers: dict[str, Points]
) -> tuple[dict[str, float], dict[str, Points]]:
    """Measurements of all ranks, the same on each rank.

    Ops take their mean. So do collectives between processors; between GPUs they take what the last rank to begin has
    measured, the least, as a rank that begins earlier also measures its wait for the last one.
    """
    session.begin_call()
    answers = session.peers.exchange_values("profile", [ops, transfers])
    all_ops = {
        key: mean(a[0][key] for a in answers if key in a[0]) for key in sorted({k for a in answers for k in a[0]})
    }
    joined = mean if session.device.type == "cpu" else min
    points = {
        kind: [(sent, joined([a[1][kind][i][1] for a in answers])) for i, (sent, _) in enumerate(own)]
        for kind, own in transfers.items()
    }
    return all_ops, points
