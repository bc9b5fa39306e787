"""Models for tests on one device. Their forwards return the loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from small import llama

Inputs = tuple[torch.Tensor, ...]


class Mlp(nn.Module):
    """Two layers, a norm, and dropout."""

    def __init__(self, drop: float = 0.2) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(12, 24), nn.LayerNorm(24)
        self.drop = nn.Dropout(drop)
        self.last = nn.Linear(24, 5)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.drop(self.norm(F.gelu(self.first(x)))))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.logits(x), y)


class Conv(nn.Module):
    """BatchNorm: buffers that the forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 5)

    def forward(self, image: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.last(F.relu(self.norm(self.conv(image))).mean((2, 3))), y)


class Llama(nn.Module):
    """A tiny Llama with tied embeddings behind positional arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.llama = llama(32, 2, 61, tie_word_embeddings=True)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.llama(input_ids=ids, labels=ids).loss


def dice(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(seed: int) -> Inputs:
    return torch.randn(6, 12, generator=dice(seed)), torch.randint(5, (6,), generator=dice(seed))


def images(seed: int) -> Inputs:
    return torch.randn(4, 3, 7, 7, generator=dice(seed)), torch.randint(5, (4,), generator=dice(seed))


def words(seed: int) -> Inputs:
    return (torch.randint(61, (2, 12), generator=dice(seed)),)


def built(kind: Callable[[], nn.Module]) -> nn.Module:
    """A model with the same values every time."""
    torch.manual_seed(0)
    return kind()
