"""Transfers of a lane in their order, which a thread of their own finishes."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Generator
from datetime import timedelta
from typing import TypeVar
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist

WAIT_TIMEOUT = timedelta(days=1)  # whoever waits for the transfer gives up before
NUM_POSTED = 2

T = TypeVar("T")
Works = list[dist.Work]
Phases = Generator[Works, None, T]
"""A collective: it posts a phase, yields what to wait for, goes on when that is over, and returns what it made."""

_QUEUES: WeakValueDictionary[int, Queue] = WeakValueDictionary()


class Transfer:
    """A collective under way. What it made is in the list `result` when it is over."""

    number = 0
    """Of the collective, in the lane's journal."""

    handed_ns = over_ns = 0
    """When it was handed to the lane, and when it was over, by `time.perf_counter_ns`."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.result: list[torch.Tensor] = []
        self.error: BaseException | None = None

    def is_completed(self) -> bool:
        return self.over.is_set()

    def wait(self) -> None:
        """Wait until it is over. Raises what went wrong."""
        self.over.wait()
        if self.error is not None:
            raise self.error


class Queue:
    """Transfers that are not over, in their order. The first few are posted, so that the wire never idles; the rest are
    not, so that the memory they receive into is not taken before its time.
    """

    def __init__(self) -> None:
        self.watched: list[Transfer] | None = None
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        _QUEUES[id(self)] = self

    @property
    def is_idle(self) -> bool:
        """Whether nothing is on its way."""
        return not self._jobs

    def add(self, phases: Phases[list[torch.Tensor]], number: int) -> Transfer:
        """Add a transfer to the queue."""
        job = Job(phases)
        job.transfer.number, job.transfer.handed_ns = number, time.perf_counter_ns()
        if self.watched is not None:
            self.watched.append(job.transfer)
        with self._changed:
            self._jobs.append(job)
            if len(self._jobs) <= NUM_POSTED:
                job.post()
            self._changed.notify()
        return job.transfer

    def close(self) -> None:
        """No more is served when those in the queue are."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def serve(self) -> None:
        """Finish one after the other until the queue is closed."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._is_closed)
                if not self._jobs:
                    return
                job = self._jobs[0]
            job.finish()
            with self._changed:
                del job  # and with it the memory that it holds
                self._jobs.popleft()
                if len(self._jobs) >= NUM_POSTED:
                    self._jobs[NUM_POSTED - 1].post()


def is_idle() -> bool:
    """Whether no lane of this process has a transfer on its way."""
    return all(queue.is_idle for ref in _QUEUES.valuerefs() if (queue := ref()) is not None)


class Job:
    """A transfer and the phases that are left of it."""

    def __init__(self, phases: Phases[list[torch.Tensor]]) -> None:
        self.phases, self.transfer = phases, Transfer()
        self.works: Works = []

    def post(self) -> None:
        """Post the first phase, or the next."""
        try:
            self.works = next(self.phases)
        except StopIteration as end:
            self._end(end.value, None)
        except BaseException as error:  # whoever waits for the transfer raises it
            self._end([], error)

    def finish(self) -> None:
        """Wait for what is posted, and do the rest."""
        while not self.transfer.is_completed():
            try:
                while self.works:  # each holds memory: none may outlive the transfer
                    self.works.pop().wait(WAIT_TIMEOUT)
            except BaseException as error:
                self._end([], error)
            else:
                self.post()

    def _end(self, result: list[torch.Tensor], error: BaseException | None) -> None:
        self.works.clear()
        self.transfer.result[:] = result
        self.transfer.error = error
        self.transfer.over_ns = time.perf_counter_ns()
        self.transfer.over.set()
