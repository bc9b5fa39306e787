"""Tasks side by side in processes that are forked from this one, with their results in order."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_PR_SET_PDEATHSIG = 1
"""Of Linux' prctl: the signal that a process gets when its parent ends."""

_TASKS: list[Callable[[], Any]] = []
"""Tasks as forked processes find them in memory: none is sent to them, so that they need not be picklable."""


@contextmanager
def side_by_side(tasks: Sequence[Callable[[], T]], num_workers: int | None = None) -> Iterator[Iterator[T]]:
    """Results of tasks, in the order of the tasks.

    Each task runs in a process that is forked from this one, as many at a time as there are processors. A task that
    fails there runs again here, where its error is raised as it is. Where processes would be of no use, or cannot be
    forked because CUDA is in use, tasks run here, one after the other.

    Args:
        tasks: pure functions; their results are picklable.
        num_workers: processes; by default as many as this one has processors.
    """
    count = min(num_workers or len(os.sched_getaffinity(0)), len(tasks))
    if count <= 1 or torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        yield (task() for task in tasks)
        return
    _TASKS[:] = tasks
    pool = ProcessPoolExecutor(count, get_context("fork"), _leave_interrupts)
    try:
        futures = [pool.submit(_result, number) for number in range(len(tasks))]
        yield (_told(future, task) for future, task in zip(futures, tasks, strict=True))
    finally:
        workers = [*(pool._processes or {}).values()]
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join()
        _TASKS.clear()


def _told(future: Future[tuple[T] | None], task: Callable[[], T]) -> T:
    try:
        found = future.result()
    except BrokenProcessPool:  # a process was killed, for its memory as a rule
        found = None
    return task() if found is None else found[0]


def _leave_interrupts() -> None:
    """An interrupt is for the process that waits, which ends the others; they end with it, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _result(number: int) -> tuple[Any] | None:
    """The result of a task; None where it failed."""
    try:
        return (_TASKS[number](),)
    except Exception:  # whatever it is, it is raised where the task runs again
        return None
