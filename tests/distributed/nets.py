"""Nets that compile in a moment, for the tests of one feature each. Their forwards return the loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, CLASSES, WORDS = 12, 5, 17


class Mlp(nn.Module):
    """Two layers and a norm."""

    def __init__(self, width: int = WIDTH, hidden: int = 24) -> None:
        super().__init__()
        self.first = nn.Linear(width, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.last = nn.Linear(hidden, CLASSES)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(F.gelu(self.first(x))))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.logits(x), y)


class Odd(nn.Module):
    """Sizes that no number of ranks divides, a parameter with fewer rows than ranks, and one without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 13)
        self.last = nn.Linear(13, CLASSES, bias=False)
        self.row = nn.Parameter(torch.randn(1, 13))
        self.two = nn.Parameter(torch.randn(2, CLASSES))
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(x)) * self.row * self.scale
        return F.cross_entropy(self.last(hidden) + self.two.sum(0), y)


class Tied(nn.Module):
    """The embedding is the last layer's weight too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(torch.tanh(self.mix(self.embed(words)))), words.roll(1))


class Dropping(nn.Module):
    """Dropout in three forms, attention's among them."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * 8)
        self.drop = nn.Dropout(0.4)
        self.last = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        query, key, value = self.project(self.drop(x)).chunk(3, -1)
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=0.3 if self.training else 0.0)
        return F.cross_entropy(self.last(F.dropout(mixed, 0.2, self.training)), y)


class Normed(nn.Module):
    """A small convolution net with BatchNorm: buffers that the forward changes.

    The convolution has no bias: BatchNorm takes it out again, its gradient would be rounding noise, and AdamW would
    make whole steps of that.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.last = nn.Linear(6, CLASSES)

    def forward(self, image: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.last(F.relu(self.norm(self.conv(image))).mean((2, 3))), y)


class Decoder(nn.Module):
    """Layers of attention and SwiGLU, large enough that a budget has something to choose from."""

    VOCABULARY = 2001

    def __init__(self, width: int = 96, num_layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(self.VOCABULARY, width)
        self.layers = nn.ModuleList(DecoderLayer(width) for _ in range(num_layers))
        self.head = nn.Linear(width, self.VOCABULARY, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return F.cross_entropy(self.head(hidden)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class DecoderLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.between = nn.RMSNorm(width), nn.RMSNorm(width)
        self.project, self.mix = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 6 * width, bias=False), nn.Linear(3 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.project(self.before(x)).unflatten(-1, (3, 4, -1)).movedim(2, 0).transpose(2, 3)
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.mix(mixed.transpose(1, 2).flatten(2))
        gate, value = self.up(self.between(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * value)


def built(kind: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A builder that gives the same values every time."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return kind()

    return build


def dice(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(seed: int, num_rows: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and classes."""
    source = dice(seed)
    return torch.randn(num_rows, WIDTH, generator=source), torch.randint(CLASSES, (num_rows,), generator=source)


def words(seed: int, length: int = 9) -> tuple[torch.Tensor]:
    return (torch.randint(WORDS, (length,), generator=dice(seed)),)


def sentences(seed: int) -> tuple[torch.Tensor]:
    return (torch.randint(Decoder.VOCABULARY, (4, 64), generator=dice(seed)),)


def images(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    source = dice(seed)
    return torch.randn(4, 3, 7, 7, generator=source), torch.randint(CLASSES, (4,), generator=source)
