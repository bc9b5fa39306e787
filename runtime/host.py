"""Memory of the host that a device's values wait in, and the lanes of copies to and from it.

On GPUs the memory is pinned, and each direction has a separate stream: copies run beside computing, in the order of
events.
On processors, where device and host are the same memory, it is taken apart from torch's allocator, so that what is
counted as the device's is what the plan says; a thread copies in each direction.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future as Promise
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from zgraph.environment import ranks_here
from zgraph.errors import OffloadError

PAGE_BYTES = mmap.PAGESIZE
"""Blocks begin and end at multiples of this, as direct access to a disk does."""


def whole_pages(num_bytes: int) -> int:
    """So many bytes, rounded up to pages."""
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


MOST_WASTE = 1 / 8
"""Share of a kept block that may lie idle when something smaller takes it."""


class HostPool:
    """Blocks of the host's memory, kept for the next that nearly fills one when their tensor dies.

    Args:
        device: whose values will be there; its copies need pinned memory if it is a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.pins = device, device.type == "cuda"
        self.alive_bytes = 0
        self.held_bytes = 0
        self._free: list[mmap.mmap] = []

    def empty(self, size: Sequence[int], dtype: torch.dtype, stride: Sequence[int] | None = None) -> torch.Tensor:
        """An uninitialised tensor in the host's memory.

        Args:
            size: its shape.
            dtype: its element type.
            stride: in elements; None lays it out densely.

        Raises:
            OffloadError: the host has no memory left.
        """
        numel = _extent(size, stride)
        if numel == 0:
            return torch.empty(tuple(size), dtype=dtype)
        num_bytes = whole_pages(numel * dtype.itemsize)
        block = self._take(num_bytes)
        window = (ctypes.c_char * num_bytes).from_buffer(block)
        weakref.finalize(window, self._give_back, block, num_bytes).atexit = False
        self.alive_bytes += num_bytes
        flat = torch.frombuffer(window, dtype=dtype, count=numel)
        return flat.view(tuple(size)) if stride is None else flat.as_strided(tuple(size), tuple(stride))

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """An uninitialised tensor with the shape, dtype and strides of another."""
        return self.empty(tensor.size(), tensor.dtype, tensor.stride())

    def release(self, num_bytes: int | None = None) -> int:
        """Give blocks that nothing is in back to the host, those first that were used longest ago; how many bytes.

        Args:
            num_bytes: to give back at least, if there is as much; None for all.
        """
        released = 0
        if self._free and self.pins:
            torch.cuda.synchronize(self.device)  # a copy may still be reading
        while self._free and (num_bytes is None or released < num_bytes):
            block = self._free.pop(0)
            released += len(block)
            self.held_bytes -= len(block)
            if self.pins:
                _unpin(block)
            block.close()
        return released

    def _take(self, num_bytes: int) -> mmap.mmap:
        fitting = [b for b in self._free if num_bytes <= len(b) and len(b) - num_bytes <= MOST_WASTE * len(b)]
        if fitting:
            best = min(reversed(fitting), key=len)
            self._free.remove(best)
            return best
        if self._free and (missing := num_bytes - available_bytes()) > 0:
            self.release(missing)
        try:
            block = self._new(num_bytes)
        except OffloadError:
            if not self.release():
                raise
            block = self._new(num_bytes)
        self.held_bytes += num_bytes
        return block

    def _new(self, num_bytes: int) -> mmap.mmap:
        try:
            block = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise OffloadError(
                f"the host has no {num_bytes:,} bytes left for what is offloaded ({error.strerror}); "
                f"{self.held_bytes:,} are in use for it. Offload less, or use fewer ranks a host."
            ) from None
        block.madvise(mmap.MADV_DONTFORK)
        if self.pins:
            _pin(block)
        return block

    def _give_back(self, block: mmap.mmap, num_bytes: int) -> None:
        self.alive_bytes -= num_bytes
        self._free.append(block)


def _extent(size: Sequence[int], stride: Sequence[int] | None) -> int:
    """Elements between the first and the last of a tensor, both counted."""
    if stride is None or 0 in size:
        return math.prod(size)
    return 1 + sum((s - 1) * st for s, st in zip(size, stride, strict=True))


def _pin(block: mmap.mmap) -> None:
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    if int(runtime.cudaHostRegister(_address(block), len(block), 0)):
        num_bytes = len(block)
        block.close()
        raise OffloadError(
            f"the driver cannot pin {num_bytes:,} bytes of the host's memory; raise the limit of locked memory "
            "(ulimit -l), or offload less"
        )


def _unpin(block: mmap.mmap) -> None:
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    runtime.cudaHostUnregister(_address(block))


def _address(block: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(block))


def available_bytes() -> int:
    """Bytes free in the host's memory: the smaller figure of the machine and of the process's control group."""
    found = [1 << 62]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            found.append(int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass  # no control group, or an older kind: the machine's own figure stands
    return min(found)


class Copy:
    """A copy under way."""

    def __init__(self, done: torch.cuda.Event | Promise[None]) -> None:
        self._done = done

    def wait(self) -> None:
        """Make later computation see the copy: the current stream waits for it, or the processor does."""
        if isinstance(self._done, Promise):
            self._done.result()
        else:
            self._done.wait()

    def synchronize(self) -> None:
        """The host sees the copy."""
        if isinstance(self._done, Promise):
            self._done.result()
        else:
            self._done.synchronize()


class CopyLane:
    """Copies in one direction, one after the other, beside computing."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._thread = ThreadPoolExecutor(1, "zgraph-copies") if self.stream is None else None
        self._last: torch.cuda.Event | None = None

    def start(self, target: torch.Tensor, source: torch.Tensor) -> Copy:
        """Begin to copy. Both must stay alive until the copy has been waited for."""
        if self.stream is None:
            assert self._thread is not None
            return Copy(self._thread.submit(_copy, target, source))
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self.stream)
        self._last = event
        return Copy(event)

    def synchronize(self) -> None:
        """The host sees all copies that were started."""
        if self.stream is not None:
            self.stream.synchronize()

    def settle(self) -> None:
        """The host may write to what was copied from: mostly these copies are over long since."""
        if self._last is not None and not self._last.query():  # type: ignore[no-untyped-call]
            self._last.synchronize()


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    with torch.no_grad():
        target.copy_(source)


class HostMemory:
    """The host's memory as one device sees it: blocks, and a lane of copies in each direction."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = HostPool(device)
        self.to_host, self.to_device = CopyLane(device), CopyLane(device)

    @property
    def free_bytes(self) -> int:
        """Bytes of the host's memory that each rank of this host may take, if all take the same."""
        return available_bytes() // max(ranks_here(), 1)

    def require(self, num_bytes: int, what: str) -> None:
        """Make sure that the host has room, before anything is moved.

        Raises:
            OffloadError: it has not, if every rank of this host takes as much.
        """
        free = self.free_bytes
        if num_bytes > free and self.pool.release():
            free = self.free_bytes
        if num_bytes > free:
            raise OffloadError(
                f"{what} need {num_bytes:,} bytes of the host's memory for each rank, but only {free:,} are free for "
                "each; offload less, shard over more hosts, or keep the optimizer's state on disk "
                "(zgraph.optim.AdamW(..., state='disk'))"
            )

    def offload(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Copy]:
        """Begin to copy a tensor of the device to the host."""
        target = self.pool.empty_like(tensor)
        return target, self.to_host.start(target, tensor)

    @contextmanager
    def after(self, copies: Iterable[Copy]) -> Iterator[None]:
        """Context whose work starts once these copies to the device are over; on a GPU, computation does not wait."""
        if self.device.type == "cuda":
            with torch.cuda.stream(self.to_device.stream):
                yield
            return
        for copy in copies:
            copy.wait()
        yield

    def reload(self, tensor: torch.Tensor, target: torch.Tensor | None = None) -> tuple[torch.Tensor, Copy]:
        """Begin to copy a tensor of the host to the device, to `target` if it is given."""
        if target is None:
            target = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=self.device)
        return target, self.to_device.start(target, tensor)
