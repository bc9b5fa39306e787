"""Models captured once a session: their graphs are what real training steps look like."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

import zgraph
from zgraph.ir import Graph


class Tied(nn.Module):
    """Dropout, a weight used twice, rows that no number of ranks above one divides, a parameter that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.second = nn.Linear(7, 7, bias=False)
        self.third = nn.Linear(7, 7)
        self.third.weight = self.second.weight
        self.scale = nn.Parameter(torch.ones(7), requires_grad=False)
        self.last = nn.Linear(7, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = nn.functional.dropout(torch.tanh(self.first(x)), 0.5) * self.scale
        return self.last(self.third(torch.tanh(self.second(h)))).mean()


class ConvNet(nn.Module):
    """BatchNorm changes its buffers; the logits are returned beside the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 3, 3), nn.BatchNorm2d(3)
        )
        self.head = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.head(self.body(x).mean((2, 3)))
        return nn.functional.cross_entropy(logits, y), logits


class Patches(nn.Module):
    """Sizes that are symbols, and products of expressions of them."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.head(self.patch(x).flatten(2).transpose(1, 2))).sum((1, 2))


class Block(nn.Module):
    """For mixed precision: matrices and vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.down(nn.functional.gelu(self.up(self.norm(x))))).square().mean()


class Wide(nn.Module):
    """Layers that fit integers of eight and four bits, those that do not, a table that is a layer, a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(48, 32)
        self.first, self.fc2 = nn.Linear(32, 64), nn.Linear(64, 32, bias=False)
        self.odd, self.up = nn.Linear(32, 24), nn.Linear(24, 32, bias=False)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.shift = nn.Parameter(torch.ones(5, 32), requires_grad=False)
        self.narrow, self.lm_head = nn.Linear(32, 64), nn.Linear(64, 48)
        self.tied = nn.Linear(32, 48, bias=False)
        self.tied.weight = self.table.weight

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.table(tokens)
        x = x + self.fc2(nn.functional.relu(self.first(x))) * self.scale
        x = nn.functional.rms_norm(x + self.up(torch.tanh(self.odd(x))), (32,)) + self.shift.mean(0)
        logits = self.tied(x) + self.lm_head(self.narrow(x))
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()), logits


@cache
def captured(name: str) -> Graph:
    """The graph of one of the models."""
    return _CAPTURES[name]()


def _llama() -> Graph:
    import small

    model = small.llama(16, 1, 13, num_heads=2, num_kv_heads=1, inner=20, tie_word_embeddings=True)
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    return zgraph.trace(model, input_ids=tokens, labels=tokens)


def _mixed_stages(name: str) -> int:
    return len(name) % 4


_CAPTURES = {
    "tied": lambda: zgraph.trace(Tied(), torch.rand(3, 5)),
    "convnet": lambda: zgraph.trace(ConvNet(), torch.rand(2, 2, 7, 7), torch.zeros(2, dtype=torch.int64)),
    "dynamic": lambda: zgraph.trace(Patches(), torch.rand(2, 2, 9, 9), dynamic=True),
    "bf16": lambda: zgraph.trace(Block(), torch.rand(4, 6), param_dtype=torch.bfloat16),
    "mixed stages": lambda: zgraph.trace(Tied(), torch.rand(3, 5), stage=_mixed_stages),
    "llama": _llama,
}
NAMES = tuple(_CAPTURES)
