"""The private corners of torch that the runtime needs, in one place. Tried on torch 2.11.0 and 2.13.0."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

__all__ = [
    "Messenger",
    "Store",
    "all_gather",
    "direct",
    "keeps_graph",
    "messenger",
    "reduce_scatter",
    "run_grad_hooks",
    "store",
]

_gather: Callable[..., dist.Work] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter: Callable[..., dist.Work] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(out: torch.Tensor, own: torch.Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Begin to gather equal parts into `out`: named all_gather_single since torch 2.13."""
    return _gather(out, own, group=group, async_op=True)


def reduce_scatter(out: torch.Tensor, whole: torch.Tensor, op: Any, group: dist.ProcessGroup) -> dist.Work:
    """Begin to reduce and scatter equal parts: named reduce_scatter_single since torch 2.13."""
    return _scatter(out, whole, op=op, group=group, async_op=True)


def store() -> Store:
    """The key-value store that the processes of this job met in."""
    return _get_default_store()


class Messenger(Protocol):
    """What a gloo group can do beside its collectives; torch's stubs leave it out."""

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> dist.Work: ...

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> dist.Work: ...


def messenger(store: Store, name: str, rank: int, num_ranks: int, timeout: timedelta) -> Messenger:
    """A gloo group of its own, with connections between all its ranks."""
    group = dist.ProcessGroupGloo(PrefixStore(name, store), rank, num_ranks, timeout)
    return cast(Messenger, group)


def direct(op: Callable[..., Any]) -> Callable[..., Any]:
    """What an ATen op calls, without the Python frame around it."""
    inner: Callable[..., Any] = getattr(op, "_op", op)
    return inner


def keeps_graph() -> bool:
    """Whether the backward that runs now was called with retain_graph=True."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def run_grad_hooks(parameter: torch.Tensor) -> None:
    """Run what `register_post_accumulate_grad_hook` registered."""
    hooks: dict[int, Callable[[torch.Tensor], None]] | None = parameter._post_accumulate_grad_hooks
    for hook in (hooks or {}).values():
        hook(parameter)
