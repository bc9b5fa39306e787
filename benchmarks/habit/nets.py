"""Small networks and their batches, for habits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HIDDEN, CLASSES, WORDS = 8, 15, 5, 23


class Net(nn.Module):
    """Two layers and a norm, without a loss. No number of ranks divides its rows."""

    def __init__(self, width: int = WIDTH, out: int = CLASSES) -> None:
        super().__init__()
        self.first = nn.Linear(width, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.act = nn.GELU()
        self.last = nn.Linear(HIDDEN, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.norm(self.first(x))))


class Classifier(Net):
    """The same, whose forward gives the loss."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(super().forward(x), y)


class Language(nn.Module):
    """A language model of one layer, with tied weights: logits of the next word."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        hidden = hidden + torch.tanh(self.mix(hidden.cumsum(-2)))
        return self.head(hidden)


class Conv(nn.Module):
    """A small convolution net with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.last = nn.Linear(6, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        return self.last(F.relu(self.norm(self.conv(image))).mean((2, 3)))


def dice(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features(seed: int, num_rows: int = 6, width: int = WIDTH) -> Tensor:
    return torch.randn(num_rows, width, generator=dice(seed))


def rows(seed: int, num_rows: int = 6) -> tuple[Tensor, Tensor]:
    """Features and classes."""
    return features(seed, num_rows), torch.randint(CLASSES, (num_rows,), generator=dice(seed + 1))


def words(seed: int, num_rows: int = 2, length: int = 7) -> Tensor:
    return torch.randint(1, WORDS, (num_rows, length), generator=dice(seed))


def images(seed: int) -> tuple[Tensor, Tensor]:
    source = dice(seed)
    return torch.randn(4, 3, 7, 7, generator=source), torch.randint(CLASSES, (4,), generator=source)


def next_word(logits: Tensor, ids: Tensor, **options: Any) -> Tensor:
    """The loss of a language model."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), **options)


def tiny_llama() -> nn.Module:
    """A Llama of transformers with two small layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=31, max_position_embeddings=32, pad_token_id=0)
    )
