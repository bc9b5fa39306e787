"""A process group of GPUs whose data goes over gloo: several ranks on one device, which NCCL refuses.

    staged_group.register()
    torch.distributed.init_process_group("staged", ...)

It keeps NCCL's order: a stream for each group, which begins a collective after what the caller's stream has been given
so far; `wait` makes the caller's stream wait, not the host. In between data is copied to pinned memory, goes over gloo
in a thread, and is copied back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

Tensors = Sequence[torch.Tensor]


class Carrier(Protocol):
    """Moves data between ranks. It is called with the group's stream as the current one, which it may block."""

    def all_gather(self, whole: torch.Tensor, own: torch.Tensor) -> None:
        """Every rank's `own` into `whole`, in the order of ranks."""

    def reduce_scatter(self, own: torch.Tensor, whole: torch.Tensor, op: Any) -> None:
        """This rank's part of the reduction of every rank's `whole`."""

    def all_reduce(self, tensor: torch.Tensor, op: Any) -> None:
        """The reduction of every rank's tensor, in its place."""

    def broadcast(self, tensor: torch.Tensor, root: int) -> None:
        """The root's tensor, in the place of every rank's."""

    def all_to_all(
        self, arriving: torch.Tensor, sent: torch.Tensor, wanted: Sequence[int], counts: Sequence[int]
    ) -> None:
        """So many rows of `sent` to each rank, and so many from each."""

    def barrier(self) -> None:
        """Returns once every rank has come."""


class Work(dist.Work):
    """A collective under way.

    Args:
        name: of the collective.
        end: recorded on the group's stream after it.
        held: tensors that must stay alive until somebody waits.
        launched: over once `end` is recorded; None if it is.
    """

    around_wait: Callable[[str], AbstractContextManager[Any]] = nullcontext
    """Context of each wait, for tests; it is given the collective's name."""

    def __init__(self, name: str, end: torch.cuda.Event, held: Tensors, launched: Future[None] | None) -> None:
        super().__init__()
        self.name, self.end, self.held, self.launched = name, end, held, launched

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Make the current stream wait."""
        if self.launched is not None:
            self.launched.result()
        with Work.around_wait(f"wait of {self.name}"):
            torch.cuda.current_stream().wait_event(self.end)
        self.held = ()
        return True

    def is_completed(self) -> bool:
        return bool(self.end.query())

    def is_success(self) -> bool:
        return True


class StreamGroup(dist.ProcessGroup):
    """A process group with a stream of its own.

    Args:
        rank: of this process.
        num_ranks: of the group.
        carrier: moves the data.
        in_thread: whether the carrier works in a thread, so that the host goes on meanwhile.
    """

    def __init__(self, rank: int, num_ranks: int, carrier: Carrier, *, in_thread: bool = True) -> None:
        super().__init__(rank, num_ranks)
        self._num_ranks, self.carrier, self._name = num_ranks, carrier, ""
        self._stream: torch.cuda.Stream | None = None
        self._thread = ThreadPoolExecutor(1, "collectives") if in_thread else None

    def size(self) -> int:
        return self._num_ranks

    def getBackendName(self) -> str:
        return "staged"

    def _set_group_name(self, name: str) -> None:
        self._name = name

    @property
    def group_name(self) -> str:
        return self._name

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cuda")]

    @property
    def stream(self) -> torch.cuda.Stream:
        """Where its collectives run."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        return self._stream

    def _start(self, name: str, held: Tensors, move: Callable[[], None]) -> Work:
        """Begin a collective: `move` on the group's stream, after what the current one has been given."""
        stream = self.stream
        end = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with Work.around_wait(f"start of {name}"):
            stream.wait_stream(torch.cuda.current_stream())

        def run() -> None:
            with torch.no_grad(), torch.cuda.stream(stream):
                move()
                end.record(stream)

        launched = self._thread.submit(run) if self._thread is not None else None
        if launched is None:
            run()
        return Work(name, end, held, launched)

    # --- collectives, as torch 2.13 calls them ---------------------------------------------------------------------

    def all_gather_single(self, whole: torch.Tensor, own: torch.Tensor, options: Any = None) -> Work:
        return self._start("all_gather", [whole, own], lambda: self.carrier.all_gather(whole, own))

    def all_gather_single_coalesced(self, wholes: Tensors, owns: Tensors, options: Any = None) -> Work:
        def move() -> None:
            for whole, own in zip(wholes, owns, strict=True):
                self.carrier.all_gather(whole, own)

        return self._start("all_gather", [*wholes, *owns], move)

    def allgather(self, parts: Sequence[list[torch.Tensor]], owns: Tensors, options: Any = None) -> Work:
        def move() -> None:
            whole = owns[0].new_empty(self._num_ranks, owns[0].numel())
            self.carrier.all_gather(whole, owns[0])
            for part, row in zip(parts[0], whole, strict=True):
                part.copy_(row.view(part.shape))

        return self._start("all_gather", [*parts[0], *owns], move)

    def reduce_scatter_single(self, own: torch.Tensor, whole: torch.Tensor, options: Any) -> Work:
        op = options.reduceOp
        return self._start("reduce_scatter", [own, whole], lambda: self.carrier.reduce_scatter(own, whole, op))

    def reduce_scatter_single_coalesced(self, owns: Tensors, wholes: Tensors, options: Any) -> Work:
        def move() -> None:
            for own, whole in zip(owns, wholes, strict=True):
                self.carrier.reduce_scatter(own, whole, options.reduceOp)

        return self._start("reduce_scatter", [*owns, *wholes], move)

    def allreduce(self, tensors: Tensors, options: Any) -> Work:
        op = options.reduceOp
        return self._start("all_reduce", tensors, lambda: self.carrier.all_reduce(tensors[0], op))

    def broadcast(self, tensors: Tensors, options: Any) -> Work:
        root = options.rootRank
        return self._start("broadcast", tensors, lambda: self.carrier.broadcast(tensors[0], root))

    def all_to_all_single(
        self,
        arriving: torch.Tensor,
        sent: torch.Tensor,
        wanted: Sequence[int],
        counts: Sequence[int],
        options: Any = None,
    ) -> Work:
        def move() -> None:
            self.carrier.all_to_all(arriving, sent, wanted, counts)

        return self._start("all_to_all", [arriving, sent], move)

    def barrier(self, opts: Any = None) -> Work:
        return self._start("barrier", [], self.carrier.barrier)

    # --- and as earlier ones do -------------------------------------------------------------------------------------

    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single


class Staged:
    """Data over gloo, by way of pinned memory.

    Args:
        store: where the ranks meet.
        rank: of this process.
        num_ranks: of the group.
        timeout: of each collective.
    """

    def __init__(self, store: dist.Store, rank: int, num_ranks: int, timeout: timedelta) -> None:
        self.rank, self.num_ranks = rank, num_ranks
        self.gloo: Any = dist.ProcessGroupGloo(store, rank, num_ranks, timeout)

    def all_gather(self, whole: torch.Tensor, own: torch.Tensor) -> None:
        given = _to_host(own)
        parts = [torch.empty_like(given) for _ in range(self.num_ranks)]
        self.gloo.allgather([parts], [given]).wait()
        _to_device(whole, torch.cat([part.view(-1) for part in parts]))

    def reduce_scatter(self, own: torch.Tensor, whole: torch.Tensor, op: Any) -> None:
        reduced = self._reduced(_to_host(whole), op)
        _to_device(own, reduced.view(self.num_ranks, -1)[self.rank])

    def all_reduce(self, tensor: torch.Tensor, op: Any) -> None:
        _to_device(tensor, self._reduced(_to_host(tensor), op))

    def broadcast(self, tensor: torch.Tensor, root: int) -> None:
        given, options = _to_host(tensor), dist.BroadcastOptions()
        options.rootRank = root
        self.gloo.broadcast([given], options).wait()
        _to_device(tensor, given)

    def all_to_all(
        self, arriving: torch.Tensor, sent: torch.Tensor, wanted: Sequence[int], counts: Sequence[int]
    ) -> None:
        given = _to_host(sent)
        made = given.new_empty(arriving.shape)
        self.gloo.alltoall_base(made, given, [*wanted], [*counts]).wait()
        _to_device(arriving, made)

    def barrier(self) -> None:
        self.gloo.barrier().wait()

    def _reduced(self, given: torch.Tensor, op: Any) -> torch.Tensor:
        """The reduction over the ranks; of few bits in fp32, and a mean as a divided sum, which gloo has no other."""
        is_small = given.is_floating_point() and given.itemsize < 4
        total, options = given.float() if is_small else given, dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.SUM if op == dist.ReduceOp.AVG else op
        self.gloo.allreduce([total], options).wait()
        return total / self.num_ranks if op == dist.ReduceOp.AVG else total


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory, once the current stream has made it."""
    made = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    made.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream().synchronize()
    return made


def _to_device(tensor: torch.Tensor, made: torch.Tensor) -> None:
    """Bring a result to where it belongs, on the current stream; its memory on the host may be reused after."""
    tensor.copy_(made.view(tensor.shape).to(tensor.dtype))


def register() -> None:
    """Let `init_process_group("staged")` make such groups."""

    def create(store: dist.Store, rank: int, num_ranks: int, timeout: timedelta) -> StreamGroup:
        return StreamGroup(rank, num_ranks, Staged(store, rank, num_ranks, timeout))

    dist.Backend.register_backend("staged", create, devices=["cuda"])
