"""Two ranks on the one GPU: losses are those of one process, and stay what they are whatever stream is late.

NCCL takes no two ranks of a device, so data goes over gloo, with NCCL's order of streams (`benchmarks.staged_group`).
Each case is trained undelayed, again to see that it repeats, and then with `torch.cuda._sleep` at the head of each
stream in turn. A wait that is missing lets a stream read what the sleeping one has yet to write.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

import zgraph
from benchmarks import staged_group
from benchmarks.lease.results import Emit
from tests.emulated.case import Case
from tests.emulated.cases import BF16, BUCKETS, GROUPED, QUICK, recipe
from tests.emulated.nets import batch, build
from tests.emulated.ranks import plain
from tests.emulated.training import options_of
from zgraph.compiler.compiled_model import compiled_model

CYCLES = 20_000_000
"""Of a sleep: some 10 ms, in which the host launches a whole step of these nets."""

LIMIT, BF16_LIMIT = 1e-4, 3e-2
"""How far losses may be from those of a processor, relative."""

LAST_S = 6.0
"""Cases are not begun later than so many seconds before the end."""

CASES = {
    "stage 3, grouped": Case(net="deep", options=recipe(3, BUCKETS, tail=GROUPED)),
    "stage 1, 2 micro-steps": Case(options={"stage": 1}, num_micro_steps=2),
    "offload parameters": Case(options={"offload": "parameters"}, num_micro_steps=2),
    "stage 3, arena": Case(options=recipe(3)),
    "stage 2": Case(options={"stage": 2}),
    "offload activations": Case(net="deep", num_rows=256, options={**recipe(3, "offload(num_bytes=100000)"), **QUICK}),
    "offload optimizer": Case(options={"offload": "optimizer"}),
    "states on the host": Case(optimizer={"state": "host", "chunk_bytes": 8192}),
    "stage 3, uneven": Case(net="odd", options={"stage": 3}, num_micro_steps=2),
    "stage 3, attention in bf16": Case(net="attending", options={"stage": 3, **BF16}),
    "stage 1, arena": Case(options=recipe(1)),
}
"""In the order in which they matter, as the last are left out where the time is short."""

REHEARSED: tuple[str, ...] | None = ("offload parameters",)
"""Cases with small sizes; None has all."""


def run(emit: Emit, small: bool) -> None:
    """Each case is a result, its repetition one, and each late stream one."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # results repeat
    torch.cuda.set_device(0)
    staged_group.register()
    dist.init_process_group("staged")
    for name, case in CASES.items():
        if small and REHEARSED is not None and name not in REHEARSED:
            continue
        if not _all_have_time(emit):
            emit(name, note="left out: the time is over")
            continue
        _try(emit, name, case)
    if not small and _all_have_time(emit):
        _without_waits(emit)


def _all_have_time(emit: Emit) -> bool:
    """Whether no rank is too late for another case: the ranks must decide alike."""
    least = torch.tensor([emit.left_s], device="cuda")
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return float(least) > LAST_S


def _try(emit: Emit, name: str, case: Case) -> None:
    """A failure on one rank ends the part, as the other would wait for it."""
    rank = dist.get_rank()
    with emit.trying(name):
        training = _Training(case)
        wanted = plain(case, 2)[rank]
        losses = training.losses()
        limit = LIMIT if case.is_exact else BF16_LIMIT
        distance = max(abs(a - b) / abs(b) for a, b in zip(losses, wanted, strict=True))
        emit(name, distance, "of one process's loss", ok=distance <= limit, ops=training.ops)
        emit(f"{name}, again", ok=training.losses() == losses)
        for stream in training.streams:
            late = training.losses(stream)
            emit(f"{name}, {stream} late", late[-1], "loss", ok=late == losses, num_sleeps=training.num_sleeps)
        return
    raise RuntimeError(f"rank {rank} cannot go on after {name}")


def _without_waits(emit: Emit) -> None:
    """The method can see a race: where nobody waits for collectives, a late group changes losses."""
    with emit.trying("a wait left out is seen"):
        training = _Training(CASES["stage 3, arena"])
        losses = training.losses()

        def leave(work: staged_group.Work, timeout: Any = None) -> bool:
            if work.launched is not None:
                work.launched.result()
            return True

        with patch.object(staged_group.Work, "wait", leave):
            late = training.losses("collectives")
        torch.cuda.synchronize()
        emit("a wait left out is seen", late[-1], "loss", ok=late != losses)


class _Training:
    """A case, compiled once and trained from the same numbers each time.

    Args:
        case: the net, and how.
    """

    def __init__(self, case: Case) -> None:
        torch.compiler.reset()
        self.case, self.num_sleeps = case, 0
        self.model: Any = build(case.net).to("cuda")
        plain_model = build(case.net)
        self.batches = {
            (step, micro): [t.to("cuda") for t in self._batch(plain_model, step, micro)]
            for step in range(case.num_steps)
            for micro in range(case.num_micro_steps)
        }
        self.compiled: Any = zgraph.compile(self.model, **{"kernels": "aten", **options_of(case)})
        self.first = {name: value.detach().clone() for name, value in self.compiled.state_dict().items()}

    @property
    def ops(self) -> dict[str, int]:
        """How often the plans have each op that moves data."""
        nodes = [node for entry in zgraph.report(self.compiled).entries for node in entry.plan.graph.nodes]
        return {op: sum(n.op == op for n in nodes) for op in sorted({n.op for n in nodes if n.op.endswith("_start")})}

    @property
    def streams(self) -> Mapping[str, torch.cuda.Stream]:
        """All that its work runs on; only those that something is copied on."""
        host = compiled_model(self.compiled).session.host
        group: Any = dist.group.WORLD
        found = {"computing": torch.cuda.current_stream(), "collectives": group.stream}
        lanes = {"to host": host.to_host.stream, "to device": host.to_device.stream}
        if self.case.options.get("offload") or "offload_start" in self.ops:
            found |= {name: stream for name, stream in lanes.items() if stream is not None}
        if (self.case.optimizer or {}).get("state"):
            found["states to host"] = self.optimizer._host.to_host.stream
            found["states to device"] = self.optimizer._host.to_device.stream
        return found

    def losses(self, late: str = "") -> list[float]:
        """Train, with a stream that is late at the beginning of each call, backward and update."""
        self._restore()
        self.num_sleeps = 0
        stream = self.streams[late] if late else None
        found: list[Tensor] = []
        for step in range(self.case.num_steps):
            for micro in range(self.case.num_micro_steps):
                is_last = micro + 1 == self.case.num_micro_steps
                with nullcontext() if is_last else zgraph.no_sync(self.compiled):
                    self._delay(stream)
                    loss = self.compiled(*self.batches[step, micro])
                    self._delay(stream)
                    loss.backward()
                    found.append(loss.detach())
                    del loss
            self._delay(stream)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return [float(loss) for loss in found]

    def _restore(self) -> None:
        torch.cuda.synchronize()
        self.compiled.load_state_dict(self.first)
        self.optimizer = self._optimizer()

    def _optimizer(self) -> Any:
        parameters, rate = self.compiled.parameters(), self.case.rate
        if self.case.optimizer is None:
            return torch.optim.AdamW(parameters, lr=rate)
        return zgraph.optim.AdamW(parameters, lr=rate, **self.case.optimizer)

    def _delay(self, stream: torch.cuda.Stream | None) -> None:
        if stream is not None:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(CYCLES)  # type: ignore[no-untyped-call]
            self.num_sleeps += 1

    def _batch(self, model: nn.Module, step: int, micro: int) -> tuple[Tensor, ...]:
        return batch(self.case.net, model, self.case.seed(step, micro) + 7 * dist.get_rank(), self.case.num_rows)
