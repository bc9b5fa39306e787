"""A device "cuda" that is the processor, in a torch that is built without CUDA.

    from tests.emulated import cuda

    cuda.install()  # before torch is imported

Everything runs at once, in the order of its launch, so numbers are right whoever waits for whom. Streams, events, waits
and the bytes that each operator touches are written down: `races` reads whether the waits would have been enough.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.emulated.build import library, torch_folder

ROOT = Path(__file__).parents[2]
RUNTIME = tuple(str(ROOT / folder) + os.sep for folder in ("zgraph", "runtime", "codegen"))
"""Where the code is whose waits are looked at."""

NAME = "NVIDIA H100 80GB HBM3"
TOTAL_BYTES = 80 << 30

_lib: Any = None
_sited = threading.local()


@dataclass(frozen=True)
class Access:
    """Bytes that an entry touches."""

    address: int
    num_bytes: int
    writes: bool


@dataclass(frozen=True)
class Entry:
    """A line of the device's log.

    Args:
        kind: op, free, record or block (of an event), sync_event, sync_stream or sync_device (of the host), or
            query_event, where the host finds that it need not wait.
        name: of the operator.
        stream: where it runs; the host's threads have negative numbers.
        event: its number, which is another for each record.
        host: the thread of the host that launched it, or that waits.
        stack: the functions that ask for the wait, the innermost first.
        accesses: what it reads and writes.
    """

    kind: str
    name: str
    stream: int
    event: int
    host: int
    stack: tuple[str, ...]
    accesses: tuple[Access, ...]

    @property
    def site(self) -> str:
        """The place that asks for the wait: the innermost functions."""
        return " < ".join(self.stack[:3])

    @property
    def holds_host(self) -> bool:
        """Whether the host stands still for the device."""
        return self.kind.startswith("sync_")

    @property
    def waits(self) -> bool:
        """Whether a stream or the host comes after an event."""
        return self.holds_host or self.kind in ("block", "query_event")


def install(total_bytes: int = TOTAL_BYTES) -> None:
    """Load the device, import torch, and have `torch.cuda` speak to it."""
    global _lib
    assert "torch" not in sys.modules, "the device comes before torch"
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(torch_folder() / "lib" / name), ctypes.RTLD_GLOBAL)
    _lib = ctypes.CDLL(str(library()), ctypes.RTLD_GLOBAL)
    _lib.emulated_log.restype = ctypes.c_char_p
    for name in ("stream", "host_record", "alive_bytes", "peak_bytes", "reserved_bytes", "end_capture"):
        getattr(_lib, f"emulated_{name}").restype = ctypes.c_int64
    for name in ("limit", "fail_after", "host", "host_wait", "begin_capture", "replay", "forget", "pool"):
        getattr(_lib, f"emulated_{name}").argtypes = [ctypes.c_int64]
    _lib.emulated_pin.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
    _lib.emulated_keep.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
    _lib.emulated_record_launch.argtypes = [_LAUNCH, ctypes.c_int64]
    _lib.emulated_resize.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
    _lib.emulated_touch.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int]
    _replace(total_bytes)
    _lib.emulated_watch_host_ops()


# --- the log ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def recorded() -> Iterator[list[Entry]]:
    """A list that has, after the `with`, what was launched in it."""
    found: list[Entry] = []
    _lib.emulated_clear()
    _lib.emulated_record(1)
    try:
        yield found
    finally:
        _lib.emulated_record(0)
        found.extend(_entry(line) for line in _lib.emulated_log().decode().splitlines())
        _lib.emulated_clear()


def _entry(line: str) -> Entry:
    kind, name, stream, event, host, stack, touched = line.split("\t")
    numbers = (map(int, access.split(",")) for access in touched.split())
    accesses = tuple(Access(address, num_bytes, bool(writes)) for address, num_bytes, writes in numbers)
    return Entry(kind, name, int(stream), int(event), int(host), tuple(stack.split()), accesses)


def touch(name: str, address: int, num_bytes: int, *, writes: bool, on_host: bool = False) -> None:
    """Write down an access that no operator of torch makes."""
    _lib.emulated_touch(name.encode(), on_host, address, num_bytes, writes)


@contextlib.contextmanager
def sited(what: str = "") -> Iterator[None]:
    """Context of a wait: the log says which functions of the runtime ask for it, after what it is called."""
    if getattr(_sited, "is_inside", False):
        yield
        return
    frame: Any = sys._getframe(2)
    names = [what] if what else []
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(RUNTIME):
            names.append(code.co_qualname.replace(".<locals>", ""))
        frame = frame.f_back
    _sited.is_inside = True
    _lib.emulated_site(" ".join(name.replace(" ", "-") for name in names).encode())
    try:
        yield
    finally:
        _sited.is_inside = False
        _lib.emulated_site(b"")


def become_thread(number: int) -> None:
    """Make this thread of the host one of its own in the log, below the main one's number."""
    _lib.emulated_host(-1 - number)


def hand_over() -> int:
    """The number of an event that this thread of the host has come to."""
    return int(_lib.emulated_host_record())


def take_over(event: int, what: str = "") -> None:
    """This thread of the host comes after another's event; for want of a name, nobody had to ask for it."""
    with sited(what) if what else contextlib.nullcontext():
        _lib.emulated_host_wait(event)


# --- memory -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def limited(num_bytes: int) -> Iterator[None]:
    """Context in which allocations that would take more than so many bytes in all raise torch.OutOfMemoryError."""
    _lib.emulated_limit(num_bytes)
    try:
        yield
    finally:
        _lib.emulated_limit(-1)


@contextlib.contextmanager
def failing_after(num_allocations: int) -> Iterator[None]:
    """Context in which the allocation after so many others raises torch.OutOfMemoryError, once."""
    _lib.emulated_fail_after(num_allocations)
    try:
        yield
    finally:
        _lib.emulated_fail_after(-1)


# --- recordings -------------------------------------------------------------------------------------------------

_LAUNCH = ctypes.CFUNCTYPE(None, ctypes.c_int64)
_launches: list[Callable[[], None]] = []
_pools = itertools.count(1)


@_LAUNCH
def _launched(number: int) -> None:
    _launches[number]()


def is_capturing() -> bool:
    """Whether this thread writes down what it launches, so that nothing runs."""
    return bool(_lib.emulated_is_capturing())


def keep(address: int, num_bytes: int) -> None:
    """Keep bytes that a launch is about to change: it does not run while a thread captures."""
    _lib.emulated_keep(address, num_bytes)


def record_launch(launch: Callable[[], None]) -> None:
    """Write down a launch that no operator of torch makes."""
    _launches.append(launch)
    _lib.emulated_record_launch(_launched, len(_launches) - 1)


class Graph:
    """`torch.cuda.CUDAGraph` of the device."""

    def __init__(self, keep_graph: bool = False) -> None:
        self._number: int | None = None
        self._pool: tuple[int, int] | None = None

    def capture_begin(self, pool: tuple[int, int] | None = None, capture_error_mode: str = "global") -> None:
        assert _lib.emulated_stream() != 0, "the default stream cannot be captured"
        self._pool = pool or new_pool()
        _lib.emulated_begin_capture(self._pool[1])

    def capture_end(self) -> None:
        self._number = _lib.emulated_end_capture()

    def replay(self) -> None:
        assert self._number is not None
        _lib.emulated_replay(self._number)

    def pool(self) -> tuple[int, int]:
        assert self._pool is not None
        return self._pool

    def __del__(self) -> None:
        if self._number is not None:
            _lib.emulated_forget(self._number)


class Pool:
    """`torch.cuda.MemPool` of the device: memory that nothing else gets."""

    def __init__(self, allocator: Any = None) -> None:
        self.allocator, self.id = allocator, new_pool()


@contextlib.contextmanager
def use_pool(pool: Pool, device: Any = None) -> Iterator[None]:
    """Context whose memory is a pool's."""
    _lib.emulated_pool(pool.id[1])
    try:
        yield
    finally:
        _lib.emulated_pool(0)


def new_pool() -> tuple[int, int]:
    """A handle of memory that recordings share."""
    return 0, next(_pools)


# --- torch.cuda -------------------------------------------------------------------------------------------------


def _replace(total_bytes: int) -> None:
    """Have `torch.cuda`, and storages, go to the device."""
    import torch

    class Stream(torch.Stream):
        """A stream whose waits say who asks for them."""

        def __new__(cls, device: Any = None, priority: int = 0, **kwargs: Any) -> Any:
            return super().__new__(cls, **kwargs) if kwargs else super().__new__(cls, torch.device("cuda", 0))

        def wait_stream(self, stream: Any) -> None:
            with sited():
                super().wait_stream(stream)

        def wait_event(self, event: Any) -> None:
            with sited():
                super().wait_event(event)

        def synchronize(self) -> None:
            with sited():
                super().synchronize()

    class Event(torch.Event):
        """An event whose waits say who asks for them."""

        def __new__(cls, device: Any = None, *, enable_timing: bool = False, **_: Any) -> Any:
            return super().__new__(cls, "cuda", enable_timing=enable_timing)

        def wait(self, stream: Any = None) -> None:
            with sited():
                super().wait(current_stream() if stream is None else stream)

        def synchronize(self) -> None:
            with sited():
                super().synchronize()

        def query(self) -> bool:
            with sited():
                return bool(super().query())

        def elapsed_time(self, end: Any) -> float:
            return 1.0

    def current_stream(device: Any = None) -> Any:
        return Stream(stream_id=_lib.emulated_stream(), device_index=0, device_type=1)

    def synchronize(device: Any = None) -> None:
        with sited():
            _lib.emulated_synchronize()

    def statistics(device: Any = None) -> dict[str, int]:
        return {
            "allocated_bytes.all.current": _lib.emulated_alive_bytes(),
            "allocated_bytes.all.peak": _lib.emulated_peak_bytes(),
            "reserved_bytes.all.current": _lib.emulated_reserved_bytes(),
        }

    def register(address: int, num_bytes: int, flags: int) -> int:
        _lib.emulated_pin(address, num_bytes)
        return 0

    properties = SimpleNamespace(total_memory=total_bytes, name=NAME, multi_processor_count=132, major=9, minor=0)
    torch.cuda.__dict__.update(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        set_device=lambda device: None,
        get_device_name=lambda device=None: NAME,
        get_device_properties=lambda device=None: properties,
        get_device_capability=lambda device=None: (9, 0),
        is_bf16_supported=lambda *args, **kwargs: True,
        synchronize=synchronize,
        current_stream=current_stream,
        stream=lambda stream: contextlib.nullcontext() if stream is None else stream,
        Stream=Stream,
        Event=Event,
        get_rng_state=lambda device=None: torch.get_rng_state(),
        set_rng_state=lambda state, device=None: None,
        cudart=lambda: SimpleNamespace(cudaHostRegister=register),
        memory_stats=statistics,
        memory_allocated=lambda device=None: _lib.emulated_alive_bytes(),
        max_memory_allocated=lambda device=None: _lib.emulated_peak_bytes(),
        memory_reserved=lambda device=None: _lib.emulated_reserved_bytes(),
        mem_get_info=lambda device=None: (total_bytes - _lib.emulated_alive_bytes(), total_bytes),
        reset_peak_memory_stats=lambda device=None: _lib.emulated_reset_peak(),
        empty_cache=lambda: None,
        CUDAGraph=Graph,
        MemPool=Pool,
        use_mem_pool=use_pool,
        graph_pool_handle=new_pool,
        is_current_stream_capturing=is_capturing,
    )
    torch.Event = Event
    _replace_storages(torch.UntypedStorage)


def _replace_storages(storages: Any) -> None:
    """Storages of the device can be resized, and copied as Triton's interpreter does."""
    import torch

    resize, to_cpu, copy = storages.resize_, storages.cpu, storages.copy_

    def resized(self: Any, num_bytes: int) -> Any:
        if self.device.type != "cuda":
            return resize(self, num_bytes)
        _lib.emulated_resize(self._cdata, num_bytes)
        return self

    def on_cpu(self: Any) -> Any:
        if self.device.type != "cuda":
            return to_cpu(self)
        made = torch.UntypedStorage(self.nbytes())
        ctypes.memmove(made.data_ptr(), self.data_ptr(), self.nbytes())
        return made

    def copied(self: Any, source: Any, non_blocking: bool = False) -> Any:
        if "cuda" not in (self.device.type, source.device.type):
            return copy(self, source, non_blocking)
        ctypes.memmove(self.data_ptr(), source.data_ptr(), self.nbytes())
        return self

    storages.resize_, storages.cpu, storages.copy_ = resized, on_cpu, copied
