"""`deepspeed.comm`: torch.distributed's functions, and what DeepSpeed has beside them.

One rank has no process group here: it counts as rank 0 of 1, and what it reduces or sends to all is what it has.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from zgraph.deepspeed.absent import finder
from zgraph.engine.initialize import init_distributed as init_distributed

_SAME = {
    "P2POp",
    "ProcessGroup",
    "ReduceOp",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_to_all",
    "all_to_all_single",
    "batch_isend_irecv",
    "broadcast_object_list",
    "destroy_process_group",
    "gather",
    "irecv",
    "is_available",
    "is_initialized",
    "isend",
    "monitored_barrier",
    "new_group",
    "recv",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "send",
}
"""Names of torch.distributed that mean the same there."""

_absent = finder(
    __name__,
    {
        "configure": "give comms_logger in the configuration",
        "log_summary": "give comms_logger in the configuration, which prints the table every steps_per_print steps",
        "initialize_mesh_device": "call torch.distributed.init_device_mesh, and give mesh= to initialize",
        "inference_all_reduce": "call all_reduce",
        "mpi_discovery": "start the ranks with torchrun",
        "set_backend": "leave it out: torch.distributed is the only one",
        "init_deepspeed_backend": "call init_distributed",
        **dict.fromkeys(
            ("allgather_fn", "has_all_gather_into_tensor"), "call all_gather_into_tensor, which torch always has"
        ),
        **dict.fromkeys(
            ("reduce_scatter_fn", "has_reduce_scatter_tensor"), "call reduce_scatter_tensor, which torch always has"
        ),
        **dict.fromkeys(
            ("all_gather_coalesced", "all_reduce_coalesced", "has_all_reduce_coalesced", "has_coalescing_manager"),
            "call the collective once a tensor: a compiled model packs its own",
        ),
    },
)


def __getattr__(name: str) -> Any:
    return getattr(dist, name) if name in _SAME else _absent(name)


def get_rank(group: Any = None) -> int:
    """This rank's number in a group; in all, by default."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def get_world_size(group: Any = None) -> int:
    """Ranks of a group; of all, by default."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def get_local_rank() -> int:
    """This rank's number on its host, as the launcher gave it."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def get_global_rank(group: Any = None, group_rank: int = 0) -> int:
    """The number among all ranks of a rank of a group."""
    return dist.get_global_rank(group, group_rank) if group is not None else group_rank


def get_world_group() -> Any:
    """The group of all ranks; None on one rank, which stands for it."""
    return dist.group.WORLD


def get_all_ranks_from_group(group: Any = None) -> list[int]:
    """The numbers of a group's ranks among all; of all, by default."""
    return dist.get_process_group_ranks(group) if dist.is_initialized() else [0]


def barrier(group: Any = None, async_op: bool = False, device_ids: list[int] | None = None) -> Any:
    """Wait for all ranks of a group."""
    return dist.barrier(group, async_op, device_ids) if dist.is_initialized() else None


def broadcast(tensor: torch.Tensor, src: int, group: Any = None, async_op: bool = False) -> Any:
    """Give all ranks of a group the tensor of one."""
    return dist.broadcast(tensor, src, group, async_op) if dist.is_initialized() else None


def all_reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
    """Give all ranks of a group the sum of their tensors, or what `op` says."""
    return dist.all_reduce(tensor, op, group, async_op) if dist.is_initialized() else None


def reduce(
    tensor: torch.Tensor, dst: int, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
) -> Any:
    """Give one rank of a group the sum of their tensors, or what `op` says."""
    return dist.reduce(tensor, dst, op, group, async_op) if dist.is_initialized() else None
