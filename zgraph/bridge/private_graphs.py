"""Recordings of what a GPU is given, which it repeats by itself (CUDA graphs), and tensors over their memory.

Tried on torch 2.13.0 with an emulated device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch

__all__ = ["Pool", "Recording", "alias", "copies", "holders", "new_pool", "recorded"]

Pool = Any
"""Handle of memory that recordings share, and nothing else."""

Recording = torch.cuda.CUDAGraph


def new_pool() -> Pool:
    """Memory for recordings. They are made and repeated one after another, so that one may use what another left."""
    return torch.cuda.graph_pool_handle()


def recorded(run: Callable[[], Sequence[Any]], pool: Pool, device: torch.device) -> tuple[Recording, Sequence[Any]]:
    """A recording of what `run` gives the GPU, and the results, whose memory has no values before the first replay.

    What `run` draws comes from the device's default generator, which torch registers with each recording: a replay
    draws on. Other threads may use the device meanwhile. Raises what `run` raises, or torch for what cannot be
    recorded.
    """
    graph = torch.cuda.CUDAGraph()
    with _capturing(graph, pool, _stream(device)):
        results = run()
    return graph, results


@contextmanager
def _capturing(graph: Recording, pool: Pool, stream: torch.cuda.Stream) -> Iterator[None]:
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            yield
        except BaseException:
            with suppress(Exception):  # it says again that there is no recording
                graph.capture_end()
            raise
        graph.capture_end()


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Where recordings are made: not on the default stream. Nothing runs on it."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def alias(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor over the same memory that does not keep it."""
    storage = tensor.untyped_storage()
    made = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), tensor.device, storage.nbytes())
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(made, tensor.storage_offset(), tensor.size(), tensor.stride())


def holders(storage: int) -> int:
    """The number of tensors, and others, that hold a storage, given by its `_cdata`."""
    return int(torch._C._storage_Use_Count(storage))


def copies(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of tensors, made in one launch."""
    made = [torch.empty_like(tensor) for tensor in tensors]
    torch._foreach_copy_(made, [*tensors])
    return made
