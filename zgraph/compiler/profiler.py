"""Measure what a compiled model costs on the devices and the network at hand, the same on all ranks."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import nn

from zgraph.bridge.target import cost_table
from zgraph.compiler.compiled_model import compiled_model
from zgraph.cost import AlphaBeta, CostTable, Hardware, save_table, signature
from zgraph.cost.hardware import THIS_MACHINE, save, this_machine_path
from zgraph.errors import UsageError
from zgraph.runtime import Session
from zgraph.runtime.collectives import exchange
from zgraph.runtime.recorder import Recorder

SIZES = (1 << 14, 1 << 20, 1 << 22)
NUM_IN_A_ROW = 4
NUM_WARMUPS = 2
_COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce")


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
    lines = {kind: AlphaBeta(latency_us=line[0], bytes_per_s=line[1]) for kind, line in transfers.items()}
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


def _transfers(session: Session, num_rounds: int) -> dict[str, tuple[float, float]]:
    """For each kind of collective its latency in microseconds and the bytes a rank sends in a second."""
    if session.num_ranks == 1:
        return {}
    ranks, shards = session.num_ranks, session.num_shards
    shares = {
        "all_gather": (shards - 1) / shards,
        "reduce_scatter": (shards - 1) / shards + 2 * (ranks - shards) / (ranks * shards),
        "all_reduce": 2 * (ranks - 1) / ranks,
    }
    lines = {}
    for kind in _COLLECTIVES:
        points = []
        for num_bytes in SIZES:
            run = exchange(kind, session, num_bytes // 4, NUM_IN_A_ROW)
            taken = []
            for _ in range(num_rounds + NUM_WARMUPS):
                session.synchronize()
                begin = time.perf_counter()
                run()
                taken.append(time.perf_counter() - begin)
            points.append((num_bytes * shares[kind], 1e6 * median(taken[NUM_WARMUPS:]) / NUM_IN_A_ROW))
        lines[kind] = _line(points)
    return lines


def _line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Latency and rate through measured (bytes, us): the rate from the largest two, the latency from the smallest."""
    (small, small_us), (large, large_us) = points[-2:]
    us_per_byte = max((large_us - small_us) / (large - small), 1e-9)
    latency_us = max(points[0][1] - points[0][0] * us_per_byte, 0.0)
    return latency_us, 1e6 / us_per_byte


def _agreed(
    session: Session, ops: dict[str, float], transfers: dict[str, tuple[float, float]]
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Measurements of all ranks, averaged, and the same on each rank."""
    session.begin_call()
    answers = [json.loads(a) for a in session.peers.exchange("profile", json.dumps([ops, transfers]))]
    all_ops = {
        key: mean(a[0][key] for a in answers if key in a[0]) for key in sorted({k for a in answers for k in a[0]})
    }
    lines = {kind: (mean(a[1][kind][0] for a in answers), mean(a[1][kind][1] for a in answers)) for kind in transfers}
    return all_ops, lines


def profile_machine(path: str | Path | None = None) -> Hardware:
    """Measure one device of this machine: matmul rates, memory bandwidth, the smallest op. Saved as `this-machine`.

    The links are those of the built-in profile: `zgraph.profile` measures them, where there are peers to send to.

    Args:
        path: where to save the profile instead.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    base = cost_table(None, device).hardware
    rates = {name: _matmul_rate(dtype, device) for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16))}
    source = torch.zeros(1 << 25, device=device)
    target = torch.empty_like(source)
    copying_s = _seconds(lambda: target.copy_(source), on_gpu)
    tiny = torch.zeros(1, device=device)
    measured = {
        "memory_bytes_per_s": 2 * source.numel() * source.element_size() / copying_s,
        "matmul_flops": rates,
        "launch_us": 1e6 * _seconds(lambda: tiny.add_(1.0), on_gpu),
    }
    found = base.model_copy(
        update={
            "name": THIS_MACHINE,
            "source": "measured by zgraph.profile_machine",
            "device": base.device.model_copy(update=measured),
        }
    )
    save(found, Path(path) if path is not None else this_machine_path())
    return found


def _matmul_rate(dtype: torch.dtype, device: torch.device, size: int = 1024) -> float:
    """FLOP a second of a square matmul."""
    a = torch.ones(size, size, dtype=dtype, device=device)
    return 2 * size**3 / _seconds(lambda: a @ a, device.type != "cpu")


def _seconds(run: Callable[[], Any], on_gpu: bool, num_rounds: int = 7) -> float:
    """The median time of one run, after two to warm up."""
    taken = []
    for _ in range(num_rounds + NUM_WARMUPS):
        began = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return median(taken[NUM_WARMUPS:])
