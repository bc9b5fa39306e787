"""Groups of ranks that hold the same shard in replicas of a model: made, compared, and given the same parameters."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from zgraph.bridge import private_runtime
from zgraph.environment import environment
from zgraph.errors import UsageError
from zgraph.optim.runs import local


def group_like(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A new group of the same ranks that nobody else uses, over gloo: means travel in a thread, beside the step's own
    collectives."""
    number = _count[group.group_name] = _count.get(group.group_name, 0) + 1
    name = f"zgraph/local_steps/{group.group_name}/{number}"
    limit = timedelta(seconds=environment().timeout_s)
    return private_runtime.joined(dist.get_process_group_ranks(group), name, limit)


_count: dict[str, int] = {}
"""How many groups were made of each, by its name."""


def agree(group: dist.ProcessGroup, problem: UsageError | None, options: str, shapes: str) -> None:
    """Raise UsageError on all ranks where replicas differ, or one has a problem."""
    found: list[tuple[str, str, str]] = [("", "", "")] * dist.get_world_size(group)
    dist.all_gather_object(found, (str(problem or ""), options, shapes), group=group)
    if problem is not None:
        raise problem
    ranks = dist.get_process_group_ranks(group)
    for rank, (its, chosen, shards) in zip(ranks, found, strict=True):
        if its:
            raise UsageError(f"local_steps on rank {rank}: {its}")
        if chosen != found[0][1]:
            raise UsageError(f"local_steps got {found[0][1]} on rank {ranks[0]}, {chosen} on rank {rank}; give all one")
        if shards != found[0][2]:
            raise UsageError(
                f"ranks {ranks[0]} and {rank} hold different shards; mesh= are the ranks that hold the same shard of "
                "each replica, and all replicas are compiled alike"
            )


@torch.no_grad()
def take_first(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Give all ranks of a group over gloo the parameters of its first."""
    for parameter in model.parameters():
        held = local(parameter)
        whole = held.cpu().contiguous().view(-1)
        dist.broadcast(whole.view(torch.uint8), group_src=0, group=group)
        held.copy_(whole.view(held.shape))
