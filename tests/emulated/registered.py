"""Jobs for tests of arenas that a group's backend knows: a fake of NCCL's writes down what it is asked for."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

import zgraph
from benchmarks.staged_group import StreamGroup
from tests.emulated import cuda
from tests.emulated.cases import BUCKETS, GROUPED, recipe
from tests.emulated.nets import batch, build
from tests.emulated.races import races
from tests.emulated.training import waiting, without_each_wait
from zgraph.bridge import private_runtime
from zgraph.compiler.compiled_model import compiled_model
from zgraph.errors import ZgraphError
from zgraph.ir import Graph, Plan, Program
from zgraph.runtime.arenas import Arenas


@dataclass
class Backend:
    """NCCL's part of a process group.

    Args:
        has_memory: whether it has an allocator for this GPU.
        problem: what registering raises; empty if it does not.
        takes_symm: whether it registers windows.
    """

    has_memory: bool = True
    problem: str = ""
    takes_symm: bool = True
    calls: list[str] = field(default_factory=list)

    mem_allocator = "NCCL's"

    def supports_tensor_alloc(self, device: torch.device) -> bool:
        return self.has_memory

    def register_mem_pool(self, pool: Any, **options: bool) -> None:
        if options and not self.takes_symm:
            raise TypeError("register_mem_pool() takes no argument symm")
        assert pool.allocator == self.mem_allocator
        self.calls.append(f"register {options}" if options else "register")
        if self.problem:
            raise RuntimeError(self.problem)

    def deregister_mem_pool(self, pool: Any) -> None:
        self.calls.append("deregister")


@contextmanager
def _of_the_group(backend: Any) -> Iterator[None]:
    with patch.object(StreamGroup, "_get_backend", lambda self, device: backend):
        yield


@dataclass
class Found:
    """Found in a training with a backend.

    Args:
        losses: of each step.
        plain: the same, with arenas for each run.
        races: in the log.
        calls: of the backend.
        state: what the report says.
        num_inside: accesses by collectives to the registered block.
    """

    losses: list[float]
    plain: list[float]
    races: list[str]
    calls: list[str]
    state: str
    num_inside: int


def train(options: dict[str, Any], backend: dict[str, Any] | None = None, *, records: bool = False) -> Found:
    """Some steps of a deep net at stage 3, with buckets in arenas."""
    fake = Backend(**backend) if backend is not None else object()
    with _of_the_group(fake):
        model, losses, log = _trained(options, records=records)
        arenas = compiled_model(model).session.arenas
        begin = arenas._block.data_ptr() if arenas._block is not None else 0
        end = begin + arenas.kept_bytes
        state = zgraph.report(model).arenas
    _, plain, _ = _trained(options, records=False)
    inside = [a for e in log for a in e.accesses if e.kind == "op" and e.stream > 0 and begin <= a.address < end]
    calls = fake.calls if isinstance(fake, Backend) else []
    return Found(losses, plain, [str(race) for race in races(log)], calls, state, len(inside))


def _trained(options: dict[str, Any], *, records: bool) -> tuple[Any, list[float], list[cuda.Entry]]:
    torch.compiler.reset()
    model: Any = build("deep").to("cuda")
    compiled = zgraph.compile(model, cuda_graphs=records, **recipe(3, BUCKETS, tail=GROUPED), **options)
    optimizer = torch.optim.AdamW(compiled.parameters())
    losses = []
    with cuda.recorded() as log:
        for seed in range(4 if records else 3):
            loss = compiled(*(t.to("cuda") for t in batch("deep", model, seed, 16)))
            loss.backward()
            losses.append(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
    return compiled, [float(loss) for loss in losses], log


def released() -> list[str]:
    """Calls of the backend in the life of one block."""
    backend = Backend()
    with _of_the_group(backend):
        arenas = Arenas(torch.device("cuda", 0), lambda: dist.group.WORLD, "registered")
        program = Program("forward", (), (), (), arena_bytes=4096)
        arenas.reserve(Plan(Graph("g"), program, None, None, ()), together=True)
        assert arenas.kept_bytes == 4096
        del arenas
        gc.collect()
    return backend.calls


def windows(fault: str) -> tuple[str, str, float, bool]:
    """What a rank raises, or how its arenas are, where the second of two has a fault; seconds; whether it has a block.

    Args:
        fault: "memory", where the second has none; "both" have none; "registering", where the second's NCCL refuses
            while the first waits in it; or "old", where torch knows no windows.
    """
    rank, torn = dist.get_rank(), threading.Event()
    waits = fault == "registering" and rank == 0
    lacks = fault == "both" or (fault == "memory" and rank == 1)
    backend = Backend(takes_symm=fault != "old", problem="invalid usage" * (fault == "registering" and rank == 1))
    if waits:

        def register(pool: Any, **options: bool) -> None:
            assert torn.wait(60), "nobody aborted the communicator"
            raise RuntimeError("NCCL communicator was aborted")

        backend.register_mem_pool = register  # type: ignore[method-assign]

    @contextmanager
    def full(pool: Any, device: Any) -> Iterator[None]:
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    with (
        _of_the_group(backend),
        patch.dict(os.environ, ZGRAPH_ARENAS="symmetric"),
        patch.object(private_runtime, "abort_groups", lambda rank: torn.set()),
        patch.object(torch.cuda, "use_mem_pool", full) if lacks else nullcontext(),
    ):
        model: Any = build("deep").to("cuda")
        compiled = zgraph.compile(model, **recipe(3, BUCKETS, tail=GROUPED))
        began = time.monotonic()
        try:
            compiled(*(t.to("cuda") for t in batch("deep", model, 0, 16))).backward()
            said = "", zgraph.report(compiled).arenas
        except ZgraphError as error:
            said = type(error).__name__, str(error)
        seconds = time.monotonic() - began
        has_block = compiled_model(compiled).session.arenas.kept_bytes > 0
    return *said, seconds, has_block


def another_stream() -> tuple[list[str], dict[str, int], set[str]]:
    """Races of forwards in turns on two streams, which share a registered block, without each wait too, and waits."""
    with _of_the_group(Backend()):
        model: Any = build("deep").to("cuda")
        compiled = zgraph.compile(model, **recipe(3, BUCKETS, tail=GROUPED))
        inputs = [t.to("cuda") for t in batch("deep", model, 0, 16)]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with cuda.recorded() as log, torch.no_grad():
            for _ in range(2):
                compiled(*inputs)
                with torch.cuda.stream(side):
                    compiled(*inputs)
    return [str(race) for race in races(log)], without_each_wait(log), waiting(log)
