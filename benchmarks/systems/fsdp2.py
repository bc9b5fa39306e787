"""FSDP2: `fully_shard` on each decoder layer, then on the root."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks.models import decoder_layers
from benchmarks.systems.base import Role, Step, System, adamw_step


def prepare(model: nn.Module, device: torch.device, *, reshard_after_forward: bool | None) -> Step:
    """reshard_after_forward: None is the default: each layer is freed after its forward, the root is not."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in (*decoder_layers(model), model):
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard_after_forward)
    return adamw_step(model)


FSDP2 = (
    System("FSDP2", Role.BASELINE, 3, partial(prepare, reshard_after_forward=None)),
    System("FSDP2 no reshard", Role.BASELINE, 2, partial(prepare, reshard_after_forward=False)),
)
