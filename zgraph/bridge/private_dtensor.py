"""The way into torch's dispatch of ops over DTensors, in one place. Tried on torch 2.13.0."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor.placement_types import _StridedShard

__all__ = ["blocks_of", "graph_task", "is_lost", "method", "placed_as", "propagation_errors", "shard", "watch"]

Op = Callable[..., Any]
Watcher = Callable[[Op, tuple[Any, ...], Mapping[str, Any], Callable[[], Any]], Any]
"""Called for an op with the op, its arguments, and what runs it as torch does."""


def watch(ops: Iterable[Op], watcher: Watcher) -> None:
    """Have a watcher run these ops, wherever an argument is a DTensor. Ops with a handler stay as they are."""
    for op in ops:
        _handlers().setdefault(op, _Watched(watcher))


def _handlers() -> dict[Any, Any]:
    return cast(dict[Any, Any], DTensor._op_dispatcher._custom_op_handlers)


class _Watched:
    """An entry of torch's table of handlers. It steps aside where torch is to run the op itself."""

    def __init__(self, watcher: Watcher) -> None:
        self.watcher = watcher

    def __call__(self, op: Op, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        def as_torch_does() -> Any:
            handlers = _handlers()
            handlers.pop(op, None)
            try:
                return op(*args, **kwargs)
            finally:
                handlers[op] = self

        return self.watcher(op, args, kwargs, as_torch_does)


def propagation_errors(converted: Callable[[Exception], Exception]) -> None:
    """Have errors of torch for an op that it does not run over DTensors raised as this makes them."""
    dispatcher: Any = DTensor._op_dispatcher
    propagate = dispatcher._propagate_op_sharding_dispatch_slow_path

    def converting(*args: Any, **kwargs: Any) -> Any:
        try:
            return propagate(*args, **kwargs)
        except Exception as error:
            raise converted(error) from error

    dispatcher._propagate_op_sharding_dispatch_slow_path = converting


def method(name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Have DTensor's method of a name be what this makes of torch's."""
    setattr(DTensor, name, make(getattr(torch.Tensor, name)))


def graph_task() -> int:
    """A number of the backward that runs on this thread; -1 outside of any."""
    return int(torch._C._current_graph_task_id())


def is_lost(written: DTensor) -> bool:
    """Whether what is written to a view of a DTensor never reaches it: the view is of gathered rows."""
    base = written._base
    if not isinstance(base, DTensor):
        return False
    return bool(written._local_tensor.untyped_storage()._cdata != base._local_tensor.untyped_storage()._cdata)


def shard(dim: int, blocks: tuple[int, ...]) -> Placement:
    """A cut of a dim, in blocks of one size if there are several. Raises ValueError for others."""
    if len(set(blocks)) > 1:
        raise ValueError(f"DTensors are cut in blocks of one size, not {blocks}")
    return Shard(dim) if len(blocks) == 1 else _StridedShard(dim, split_factor=len(blocks))


def blocks_of(placement: object) -> tuple[int, int] | None:
    """The dim that a placement of torch cuts, and in how many blocks; None of one that cuts none."""
    if isinstance(placement, _StridedShard):
        return placement.dim, int(placement.split_factor)
    return (placement.dim, 1) if isinstance(placement, Shard) else None


def placed_as(whole: torch.Tensor, like: DTensor) -> torch.Tensor:
    """This rank's part of a plain tensor that is as large as a DTensor, placed as that is."""
    local = whole
    for axis, placement in enumerate(like.placements):
        if placement.is_shard() or isinstance(placement, _StridedShard):
            dim = cast(Any, placement).dim
            size, num_ranks = local.shape[dim], like.device_mesh.size(axis)
            if isinstance(placement, _StridedShard):
                blocks = torch.split(local, size // int(placement.split_factor), dim)
                rank = like.device_mesh.get_local_rank(axis)
                local = torch.cat([block.chunk(num_ranks, dim)[rank] for block in blocks], dim)
                continue
            rows = -(-size // num_ranks)
            start = min(size, rows * like.device_mesh.get_local_rank(axis))
            local = local.narrow(dim, start, min(rows, size - start))
    return local
