"""zgraph, stages 0 to 3."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from benchmarks.systems.base import Role, Step, System, adamw_step


def prepare(model: nn.Module, device: torch.device, *, stage: int) -> Step:
    import zgraph

    compiled: nn.Module = zgraph.compile(model, stage=stage)
    return adamw_step(compiled)


ZGRAPH = tuple(
    System(f"zgraph stage {stage}", Role.ZGRAPH, stage, partial(prepare, stage=stage), "zgraph", "zgraph")
    for stage in (0, 1, 2, 3)
)
