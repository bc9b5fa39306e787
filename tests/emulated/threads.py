"""Threads of the host in the log: those that move optimizer states between memory and disk."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from tests.emulated import cuda
from zgraph.runtime import disk
from zgraph.runtime.host import HostPool

FILE = 1 << 60
"""Bytes of files are at their offset from here; one file is open at a time."""

_numbers = itertools.count(1)
_here = threading.local()
_ended: dict[int, list[int]] = defaultdict(list)
"""The ends of jobs that touched a block, by its address. They held it, so whoever has it next comes later."""


class WatchedPool(ThreadPoolExecutor):
    """A pool whose threads are their own in the log: a job begins after its submission, and a result after the job."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        begun = cuda.hand_over()
        ends: list[int] = []

        def run() -> Any:
            if not hasattr(_here, "number"):
                _here.number = next(_numbers)
                cuda.become_thread(_here.number)
            _here.blocks = set()
            cuda.take_over(begun)
            try:
                return fn(*args, **kwargs)
            finally:
                ends.append(cuda.hand_over())
                for block in _here.blocks:
                    _ended[block].append(ends[0])

        future = super().submit(run)
        own_result = future.result

        def result(timeout: float | None = None) -> Any:
            found = own_result(timeout)
            cuda.take_over(ends[0], "Future.result")
            return found

        future.result = result  # type: ignore[method-assign]
        return future


def _watched(move: Callable[..., int], name: str, *, reads_file: bool) -> Callable[..., int]:
    """A read or write of a file, with the memory and the part of the file that it touches."""

    def moved(file: int, windows: Sequence[memoryview], offset: int) -> int:
        for window in windows:
            view = np.frombuffer(window, dtype=np.uint8)
            _here.blocks.add(view.ctypes.data)
            cuda.touch(name, view.ctypes.data, view.nbytes, writes=reads_file, on_host=True)
            cuda.touch(f"{name} of the file", FILE + offset, view.nbytes, writes=not reads_file, on_host=True)
        return move(file, windows, offset)

    return moved


def _hand_blocks_over() -> None:
    """A block of the host's memory that is given back by one thread and taken by another orders both."""
    given: dict[int, list[int]] = {}
    give_back, take = HostPool._give_back, HostPool._take

    def gives(self: HostPool, block: mmap.mmap, num_bytes: int) -> None:
        address = ctypes.addressof(ctypes.c_char.from_buffer(block))
        given[address] = [cuda.hand_over(), *_ended.pop(address, [])]
        give_back(self, block, num_bytes)

    def takes(self: HostPool, num_bytes: int) -> mmap.mmap:
        block = take(self, num_bytes)
        for event in given.pop(ctypes.addressof(ctypes.c_char.from_buffer(block)), []):
            cuda.take_over(event)
        return block

    HostPool._give_back, HostPool._take = gives, takes  # type: ignore[method-assign]


def watch() -> None:
    """Have the threads of `zgraph.runtime.disk` written down."""
    _hand_blocks_over()
    disk.ThreadPoolExecutor = WatchedPool  # type: ignore[misc]
    os.preadv = _watched(os.preadv, "preadv", reads_file=True)
    os.pwritev = _watched(os.pwritev, "pwritev", reads_file=False)
