"""Nets of all kinds of layers, small, with a loss as their result; some of them drawn by a seed."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from tests.distributed.nets import Mlp, Odd, Tied, rows, words

WORDS = 61


class Residual(nn.Module):
    """Pairs of linear layers with a norm before each, which all share."""

    def __init__(self, width: int = 64, num_layers: int = 2) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, width))
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for layer in self.layers:
            x = x + layer(self.norm(x))
        return (x - y.roll(1, 0)).square().mean()


class Attending(nn.Module):
    """A decoder whose attention is spelled out: the processor has no kernel under the names of a GPU's."""

    def __init__(self, width: int = 32, num_layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        self.layers = nn.ModuleList(_Block(width) for _ in range(num_layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, WORDS, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return F.cross_entropy(self.head(self.norm(hidden))[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.between = nn.RMSNorm(width), nn.RMSNorm(width)
        self.project, self.mix = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(2 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.project(self.before(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
        x = x + self.mix((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
        gate, up = self.up(self.between(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Drawn(nn.Module):
    """A net drawn by a seed: widths that nothing divides, norms, residuals, shared and frozen parameters."""

    ACTIVATIONS = (torch.tanh, F.silu, F.gelu, torch.sigmoid)

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.width = draw.choice((5, 12, 17, 32))
        self.blocks = nn.ModuleList()
        self.plan: list[tuple[Callable[[torch.Tensor], torch.Tensor], bool]] = []
        for _ in range(draw.randint(1, 4)):
            hidden = draw.choice((3, 7, 16, 33, 48))
            norm = draw.choice((nn.LayerNorm, nn.RMSNorm, nn.Identity))(self.width)
            up, down = nn.Linear(self.width, hidden, bias=draw.random() < 0.7), nn.Linear(hidden, self.width)
            if self.blocks and draw.random() < 0.3 and self.blocks[-1][1].weight.shape == up.weight.shape:
                up = self.blocks[-1][1]
            if draw.random() < 0.2:
                down.bias.requires_grad_(False)
            self.blocks.append(nn.ModuleList([norm, up, down]))
            self.plan.append((draw.choice(self.ACTIVATIONS), draw.random() < 0.7))
        self.scale = nn.Parameter(torch.tensor(1.5)) if draw.random() < 0.5 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for (norm, up, down), (activation, is_residual) in zip(self.blocks, self.plan, strict=True):
            made = down(activation(up(norm(x))))
            x = x + made if is_residual else made
        if self.scale is not None:
            x = x * self.scale
        return (x - y.roll(1, 0)).square().mean()


NETS: dict[str, Callable[[], nn.Module]] = {
    "mlp": Mlp,
    "odd": Odd,
    "tied": Tied,
    "residual": Residual,
    "deep": lambda: Residual(64, 6),
    "attending": Attending,
}


def build(name: str) -> nn.Module:
    """The net of a name, or of `drawn-SEED`, with the same values every time."""
    kind, _, seed = name.partition("-")
    torch.manual_seed(int(seed or 0))
    return Drawn(int(seed)) if kind == "drawn" else NETS[kind]()


def batch(name: str, model: nn.Module, seed: int, num_rows: int) -> tuple[torch.Tensor, ...]:
    """Inputs of a net."""
    source = torch.Generator().manual_seed(seed)
    if name in ("mlp", "odd"):
        return rows(seed, num_rows)
    if name == "tied":
        return words(seed, num_rows)
    if name == "attending":
        return (torch.randint(WORDS, (num_rows // 4, 16), generator=source),)
    return (torch.randn(num_rows, model.width, generator=source),)
