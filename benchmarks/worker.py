"""One rank of one launch: python -m benchmarks.worker FOLDER RANK [INTERFACE_TO_COUNT]."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import hosts, memory, models
from benchmarks.job import Job, Measure, RankReport
from benchmarks.systems import BY_NAME, System
from benchmarks.systems.zgraph_stages import CalibratedStep

Floats = tuple[float, ...]
NumberedStep = Callable[[int], Tensor]
"""Takes the training step of that number, on the batch of that number, and returns its loss."""


def main(folder: Path, rank: int, interface: str | None) -> None:
    """Read the job, train, and write this rank's report beside it."""
    torch.set_num_threads(1)
    job = Job.read(folder)
    system = BY_NAME[job.system]
    device = _device(job)
    if system.is_distributed:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=job.world_size,
            timeout=timedelta(minutes=5),
        )
    report = _measure(job, system, rank, device, interface)
    report.write(folder, rank)
    if system.is_distributed:
        dist.destroy_process_group()


def _device(job: Job) -> torch.device:
    if job.device != "cuda":
        return torch.device(job.device)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def _measure(job: Job, system: System, rank: int, device: torch.device, interface: str | None) -> RankReport:
    num_parameters, told = 0, dict[str, Any]()
    predicts: list[CalibratedStep] = []

    def prepare() -> NumberedStep:
        nonlocal num_parameters, told
        model = models.build(job.model, device)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        step = system.prepare(model, device)
        if isinstance(step, CalibratedStep):
            predicts.append(step)
        told = {"num_batches": getattr(step, "num_batches", None), "words": getattr(step, "words", "")}
        number = getattr(step, "batch_rank", rank)  # ranks that compute together have one batch
        return lambda index: step(models.batch(job.model, step=index, rank=number, device=device))

    if job.measure is Measure.MEMORY:
        live = memory.measure(prepare, warmup=job.num_warmup, device=device)
        outlook = asdict(predicts[0].outlook()) if predicts else None
        return RankReport(num_parameters, rest_bytes=live.rest_bytes, peak_bytes=live.peak_bytes, outlook=outlook)
    step = prepare()
    for index in range(job.num_warmup):
        step(index)
    for predicting in predicts:
        predicting.begin()
    sent_before = _sent_bytes(interface)
    step_s, losses = _time(step, range(job.num_warmup, job.num_warmup + job.num_steps), device)
    sent_after = _sent_bytes(interface)
    sent = None if sent_before is None or sent_after is None else sent_after - sent_before
    outlook = asdict(predicts[0].outlook()) if predicts else None
    return RankReport(num_parameters, step_s, losses, sent, outlook=outlook, **told)


def _time(step: NumberedStep, indices: range, device: torch.device) -> tuple[Floats, Floats]:
    """Seconds and loss of each step. Nothing between two steps waits for the other ranks."""
    seconds, losses = [], []
    for index in indices:
        start = time.perf_counter()
        losses.append(step(index))
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return tuple(seconds), tuple(float(loss) for loss in losses)


def _sent_bytes(interface: str | None) -> int | None:
    """The counter when every rank has come here: the barrier itself sends some hundred bytes."""
    if dist.is_initialized():
        dist.barrier()
    return None if interface is None else hosts.sent_bytes(interface)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
