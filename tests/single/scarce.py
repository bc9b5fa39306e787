"""An op that is out of memory when it is told to, in its forward or its backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

MESSAGE = (
    "CUDA out of memory. Tried to allocate 6.00 KiB. GPU 0 has a total capacity of 79.10 GiB of which 2.00 KiB is free."
)
"""As torch's: 4 KiB are missing."""

fails: list[str] = []
"""Phases that fail, each once."""

errors: list[type[Exception]] = [torch.OutOfMemoryError]
"""The last is the error that they fail with."""


def _come(phase: str) -> None:
    if phase in fails:
        fails.remove(phase)
        raise errors[-1](MESSAGE)


@torch.library.custom_op("user::scarce", mutates_args=())
def scarce(x: torch.Tensor) -> torch.Tensor:
    _come("forward")
    return x.clone()


@torch.library.custom_op("user::scarce_backward", mutates_args=())
def scarce_backward(gradient: torch.Tensor) -> torch.Tensor:
    _come("backward")
    return gradient.clone()


scarce.register_fake(torch.empty_like)
scarce_backward.register_fake(torch.empty_like)
scarce.register_autograd(lambda ctx, gradient: scarce_backward(gradient))


@contextmanager
def failing(*phases: str, error: type[Exception] = torch.OutOfMemoryError) -> Iterator[None]:
    """Context in which these phases are out of memory, each as often as it is named."""
    fails[:] = phases
    errors.append(error)
    try:
        yield
    finally:
        fails.clear()
        errors.pop()


class Scarce(nn.Module):
    """Layers whose values can be computed again, dropout, and the op behind them."""

    def __init__(self, num_layers: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(num_layers))
        self.drop = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = nn.functional.gelu(layer(x)).sin()
        return scarce(self.drop(x)).square().mean()
