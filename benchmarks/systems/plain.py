"""One process, eager, nothing sent."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.systems.base import Role, Step, System, adamw_step


def prepare(model: nn.Module, device: torch.device) -> Step:
    return adamw_step(model)


PLAIN = (System("plain eager", Role.COMPUTE, 0, prepare),)
