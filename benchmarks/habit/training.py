"""Training of a model on rows of numbers, whose loss is computed in its forward or outside of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.habit.nets import rows
from benchmarks.habit.side import Side, trained
from benchmarks.habit.table import Found


def training(side: Side, model: nn.Module, **options: Any) -> Found:
    """Train a model whose forward gives the loss."""
    return trained(side, model, lambda step: model(*rows(side.seed(step))), **options)


def outside(side: Side, model: nn.Module, call: Callable[[Tensor], Tensor] | None = None) -> Found:
    """Train a model, called by `call` where that is given, with a cross entropy of what it gives."""

    def loss(step: int) -> Tensor:
        x, y = rows(side.seed(step))
        return F.cross_entropy((call or model)(x), y)

    return trained(side, model, loss)
