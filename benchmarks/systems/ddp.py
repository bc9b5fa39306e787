"""DistributedDataParallel: gradients all-reduced in buckets during the backward."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.systems.base import Role, Step, System, adamw_step


def prepare(model: nn.Module, device: torch.device) -> Step:
    return adamw_step(DistributedDataParallel(model, gradient_as_bucket_view=True))


DDP = (System("DDP", Role.BASELINE, 0, prepare),)
