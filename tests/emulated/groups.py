"""Process groups of emulated devices: over gloo, and one whose other ranks are echoes of this one.

An echo holds the same shard as this rank and makes the same gradients. A gather gives this rank's chunk again and
again, and a mean over the ranks is this rank's own: `reference` computes the same without any group.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import staged_group
from benchmarks.staged_group import StreamGroup, Work
from tests.emulated import cuda, threads
from tests.emulated.server import Group
from zgraph.runtime.meetings import Meetings
from zgraph.runtime.peers import Peers


class Echo:
    """Data that comes back.

    Args:
        rank: of this process.
        num_ranks: of the group.
    """

    def __init__(self, rank: int, num_ranks: int) -> None:
        self.rank, self.num_ranks = rank, num_ranks

    def all_gather(self, whole: torch.Tensor, own: torch.Tensor) -> None:
        whole.view(self.num_ranks, -1).copy_(own.reshape(1, -1).expand(self.num_ranks, -1))

    def reduce_scatter(self, own: torch.Tensor, whole: torch.Tensor, op: Any) -> None:
        own.view(-1).copy_(whole.view(self.num_ranks, -1)[self.rank])
        if op == dist.ReduceOp.SUM:
            own.mul_(self.num_ranks)

    def all_reduce(self, tensor: torch.Tensor, op: Any) -> None:
        tensor.mul_(self.num_ranks if op == dist.ReduceOp.SUM else 1)

    def broadcast(self, tensor: torch.Tensor, root: int) -> None:
        tensor.copy_(tensor.clone())

    def all_to_all(
        self, arriving: torch.Tensor, sent: torch.Tensor, wanted: Sequence[int], counts: Sequence[int]
    ) -> None:
        given = sent.reshape(-1).repeat(self.num_ranks)  # it does not know what another rank would send here
        arriving.view(-1).copy_(given[: arriving.numel()] if sent.numel() else arriving.view(-1) * 0)

    def barrier(self) -> None:
        pass


def join(group: Group) -> None:
    """Make this process a rank of a group, and have waits for others written down."""
    Work.around_wait = cuda.sited  # type: ignore[assignment]
    threads.watch()
    dist.get_backend = lambda group=None: "nccl"
    store: dist.Store
    if group.kind == "staged":
        staged_group.ThreadPoolExecutor = threads.WatchedPool  # type: ignore[misc]
        staged_group.register()
        store = dist.TCPStore("127.0.0.1", group.port, is_master=False)
    else:
        dist.Backend.register_backend("echo", _echo, devices=["cuda"])
        store = dist.HashStore()
        Meetings.agree = lambda self, what, text: None  # type: ignore[method-assign]
        Peers.exchange = lambda self, what, word, **_: [word] * len(self.ranks)  # type: ignore[method-assign]
        Peers.smallest = lambda self, what, place, number, seconds: number  # type: ignore[method-assign]
    dist.init_process_group(group.kind, store=store, rank=group.rank, world_size=group.num_ranks)


def _echo(store: dist.Store, rank: int, num_ranks: int, timeout: timedelta) -> StreamGroup:
    return StreamGroup(rank, num_ranks, Echo(rank, num_ranks), in_thread=False)
