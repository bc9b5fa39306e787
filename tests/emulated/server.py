"""Processes with an emulated device, which run jobs for tests: the device must be there before torch is imported."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.patience import Deadline

START_LIMIT_S = 120
"""To import everything, on a machine that is busy."""


@dataclass(frozen=True)
class _Failure:
    text: str


@dataclass(frozen=True)
class Group:
    """The process group of a process.

    Args:
        kind: "echo", whose other ranks are echoes, or "staged", over gloo.
        rank: of the process.
        num_ranks: of the group.
        port: where the ranks of "staged" meet.
        folder: for caches.
    """

    kind: str
    rank: int
    num_ranks: int
    port: int = 0
    folder: str = ""


class JobError(AssertionError):
    """A job failed in a process, or did not end in time. The message holds the traceback."""


class Server:
    """Processes with a device each, and one group. They are started with the first job, and again after a failure.

    Args:
        kind: of the group, see `Group`.
        num_ranks: of the group: an "echo" is one process all the same.
    """

    def __init__(self, kind: str, num_ranks: int) -> None:
        self.kind, self.num_ranks = kind, num_ranks
        self.processes: list[multiprocessing.process.BaseProcess] = []
        self.pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._store: Any = None

    def run(self, job: Callable[..., Any], *args: Any, limit_s: float = 120, **kwargs: Any) -> Any:
        """Return value of `job(*args, **kwargs)`; of several processes a list.

        Args:
            job: a function at the top of a module, which only the processes import.
            args, kwargs: what it is called with.
            limit_s: seconds after which the processes are killed, on a machine that has nothing else to do.

        Raises:
            JobError: it raised, or the time was over.
        """
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((job.__module__, job.__qualname__, args, kwargs))
        answers = self._answers(limit_s)
        if failures := [f"rank {r}: {a.text}" for r, a in enumerate(answers) if isinstance(a, _Failure)]:
            self.stop()
            raise JobError(f"{job.__name__}{args} failed\n" + "\n".join(failures))
        return answers if len(answers) > 1 else answers[0]

    def stop(self) -> None:
        """Kill the processes. The next job starts new ones."""
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self.pipes:
            pipe.close()
        self.processes, self.pipes = [], []
        if self._folder is not None:
            self._folder.cleanup()

    def _start(self) -> None:
        import torch.distributed as dist  # not above: the processes import this module before they have a device

        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        is_staged = self.kind == "staged"
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if is_staged else None
        for rank in range(self.num_ranks if is_staged else 1):
            ours, theirs = context.Pipe()
            port = self._store.port if self._store is not None else 0
            group = Group(self.kind, rank, self.num_ranks, port, self._folder.name)
            process = context.Process(target=_serve, args=(group, theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)
        failures = [a for a in self._answers(START_LIMIT_S) if a != "ready"]
        if failures:
            self.stop()
            raise JobError(f"the device did not start: {failures}")

    def _answers(self, limit_s: float) -> list[Any]:
        deadline = Deadline(limit_s)
        answers: dict[Connection, Any] = {}
        while len(answers) < len(self.pipes):
            ready = wait([p for p in self.pipes if p not in answers], deadline.left())
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                try:
                    answers[pipe] = pipe.recv()
                except EOFError:
                    answers[pipe] = _Failure("the process ended")
                if isinstance(answers[pipe], _Failure):
                    deadline.shorten(10)
        return [answers.get(p, _Failure(f"no answer within {limit_s:g} s")) for p in self.pipes]


def _serve(group: Group, pipe: Connection) -> None:
    """Body of a process: a device, a group, then jobs until it is killed."""
    from tests.emulated import cuda

    cuda.install()
    os.environ["XDG_CACHE_HOME"] = str(Path(group.folder) / f"cache-{group.rank}")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":0:0"  # budgets here are smaller than its workspace
    import torch

    from tests.emulated import groups, kernels
    from zgraph.runtime import clock

    clock.COLD_BYTES = clock.FEWEST_COLD_BYTES = 1 << 16  # there is no cache to empty

    torch.set_num_threads(1)
    kernels.watch()
    groups.join(group)
    pipe.send("ready")
    while True:
        try:
            module, name, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            answer = getattr(importlib.import_module(module), name)(*args, **kwargs)
        except BaseException:
            answer = _Failure(traceback.format_exc())
        torch.compiler.reset()
        pipe.send(answer)
