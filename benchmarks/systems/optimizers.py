"""zgraph at stage 3 with its own optimizers."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from benchmarks.systems.base import LEARNING_RATE, Role, Step, System, step_of


def prepare(model: nn.Module, device: torch.device, *, optimizer: str, **options: float) -> Step:
    import zgraph
    import zgraph.optim

    compiled: nn.Module = zgraph.compile(model, stage=3)
    return step_of(compiled, getattr(zgraph.optim, optimizer)(compiled.parameters(), **options))


OPTIMIZERS = (
    System("AdamW", Role.ZGRAPH, 3, partial(prepare, optimizer="AdamW", lr=LEARNING_RATE), "zgraph", "zgraph"),
    System(
        "Muon", Role.ZGRAPH, 3, partial(prepare, optimizer="Muon", lr=0.02, adam_lr=LEARNING_RATE), "zgraph", "zgraph"
    ),
)
