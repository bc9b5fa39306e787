"""Memory that NCCL knows: a pool of its allocator, registered with a group's communicator.

Written by the source of torch 2.11 to 2.13 (`ProcessGroupNCCL.cpp`, `torch/cuda/memory.py`); tried with a fake of the
backend that records its calls.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist

from zgraph.errors import in_one_line

__all__ = ["PooledBlock", "pooled_block"]


class PooledBlock:
    """Memory in a pool of its own, which can be registered with a group.

    Args:
        memory: bytes.
        pool: in which nothing else is.
        backend: of the group.
    """

    def __init__(self, memory: torch.Tensor, pool: Any, backend: Any) -> None:
        self.memory, self._pool, self._backend = memory, pool, backend

    def register(self, *, symmetric: bool) -> str:
        """Have the group know the memory; why that cannot be, or nothing.

        Args:
            symmetric: whether it is a window at the same place on all ranks; then all ranks call this together, and
                each waits for the others.
        """
        try:
            self._backend.register_mem_pool(self._pool, **({"symm": True} if symmetric else {}))
        except (RuntimeError, TypeError) as error:  # of NCCL without it, of torch without `symm`
            return in_one_line(error)
        return ""

    def release(self) -> None:
        """Have the group forget the memory, unless the group is gone."""
        with suppress(RuntimeError):
            self._backend.deregister_mem_pool(self._pool)


def pooled_block(num_bytes: int, device: torch.device, group: dist.ProcessGroup) -> PooledBlock | str:
    """Memory that can be registered with a group, or why there can be none. No rank waits for another here.

    The pool has the block before it is registered, and never grows: torch registers later segments in other ways from
    version to version.

    Args:
        num_bytes: how many.
        device: of this rank.
        group: whose collectives read and write it.
    """
    found: Any = group
    try:
        backend = found._get_backend(device)
    except RuntimeError:
        return "the process group has no backend for GPUs"
    if not hasattr(backend, "register_mem_pool"):
        return f"torch {torch.__version__} registers no memory with {type(backend).__name__}"
    if hasattr(backend, "supports_tensor_alloc") and not backend.supports_tensor_alloc(device):
        return "NCCL has no memory of its own for this GPU"
    try:
        pool = torch.cuda.MemPool(backend.mem_allocator)
        with torch.cuda.use_mem_pool(pool, device=device):
            memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    except (RuntimeError, TypeError) as error:  # of memory, of torch that knows no allocator
        return in_one_line(error)
    return PooledBlock(memory, pool, backend)
