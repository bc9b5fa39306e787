"""Worker processes that the whole test session shares: starting processes is what makes such suites slow.

A job is a function at the top of a module. It is called on each of its ranks with a mesh over these ranks, then its
arguments; what it returns travels back through a pipe, so it must pickle (numbers and texts, not tensors).
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from tests.patience import Deadline, slowness

START_LIMIT_S = 120
IMPORTED = (
    "zgraph",
    "torch._dynamo.convert_frame",
    "torch._functorch.aot_autograd",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    *(f"transformers.models.{m}.modeling_{m}" for m in ("bert", "gpt2", "llama", "mixtral", "resnet", "vit")),
)
"""What jobs need takes seconds to import: it is done once, in the process that workers are forked from."""
GRACE_S = 10
"""How long the others may go on when one rank has failed: they may wait for it in vain."""
DIED = "died"
"""The answer of a rank whose process ended."""


class JobError(AssertionError):
    """A job failed on some rank, or did not end in time. The message holds the traceback of each rank that failed."""


@dataclass(frozen=True)
class _Failure:
    text: str


class Pool:
    """Processes joined by gloo. They are started with the first job, and again after a job that left them in doubt."""

    def __init__(self, num_workers: int = 4) -> None:
        self.num_workers = num_workers
        self.workers: list[multiprocessing.process.BaseProcess] = []
        self.pipes: list[Connection] = []
        self.store: dist.TCPStore | None = None

    def run(
        self,
        job: Callable[..., Any],
        num_ranks: int,
        *args: Any,
        limit_s: float = 90,
        spoils: bool = False,
        may_die: bool = False,
    ) -> list[Any]:
        """What `job(mesh, *args)` returned on each of `num_ranks` ranks.

        Args:
            job: a function at the top of a module.
            num_ranks: how many ranks run it, from rank 0 on.
            args: what it is called with after the mesh.
            limit_s: seconds after which the pool is killed, on a machine that has nothing else to do.
            spoils: says that communication is out of step after this job, so that no other must follow on these
                workers.
            may_die: a rank's end is an answer, DIED, not a failure.

        Raises:
            JobError: it raised, or the time was over.
        """
        if not self.workers:
            self.start()
        for pipe in self.pipes[:num_ranks]:
            pipe.send((job, num_ranks, args, limit_s))
        answers = self._answers(self.pipes[:num_ranks], limit_s)
        if not may_die:
            answers = [_Failure("the process ended") if a is DIED else a for a in answers]
        failures = [f"rank {r}: {a.text}" for r, a in enumerate(answers) if isinstance(a, _Failure)]
        if failures or spoils:
            self.stop()
        if failures:
            raise JobError(f"{job.__name__}{args} failed\n" + "\n".join(failures))
        return answers

    def start(self) -> None:
        """Start the workers, and wait until they have imported everything and met."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(IMPORTED))
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(self.num_workers):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(rank, self.num_workers, self.store.port, theirs), daemon=True)
            worker.start()
            theirs.close()
            self.workers.append(worker)
            self.pipes.append(ours)
        answers = self._answers(self.pipes, START_LIMIT_S)
        if answers != ["ready"] * self.num_workers:
            self.stop()
            raise JobError(f"the workers did not start: {answers}")

    def stop(self) -> None:
        """Kill the workers. The next job starts new ones."""
        for worker in self.workers:
            worker.kill()
            worker.join()
        for pipe in self.pipes:
            pipe.close()
        self.workers, self.pipes, self.store = [], [], None

    @staticmethod
    def _answers(pipes: list[Connection], limit_s: float) -> list[Any]:
        deadline = Deadline(limit_s)
        answers: dict[Connection, Any] = {}
        while len(answers) < len(pipes):
            ready = wait([p for p in pipes if p not in answers], deadline.left())
            if not ready:
                break
            for pipe in ready:
                try:
                    answers[pipe] = pipe.recv()
                except EOFError:
                    answers[pipe] = DIED
                if isinstance(answers[pipe], _Failure):
                    deadline.shorten(GRACE_S)
        return [answers.get(p, _Failure(f"no answer within {limit_s:g} s")) for p in pipes]


def _work(rank: int, num_workers: int, port: int, pipe: Connection) -> None:
    """A worker: meets the others, then does jobs until it is killed."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_workers)
    meshes = {n: DeviceMesh("cpu", list(range(n))) for n in range(1, num_workers + 1)}
    gc.freeze()  # what is imported stays: to look through it after each job would take longer than many a job
    pipe.send("ready")
    while True:
        try:
            job, num_ranks, args, limit_s = pipe.recv()
        except EOFError:
            return
        faulthandler.dump_traceback_later(limit_s * slowness() * 0.9)
        try:
            answer = job(meshes[num_ranks], *args)
        except BaseException:
            answer = _Failure(traceback.format_exc())
        faulthandler.cancel_dump_traceback_later()
        torch._dynamo.reset()
        gc.collect()
        pipe.send(answer)
