"""Models of torch's own layers, for benchmarks/zoo.py: recurrent nets, transformers, convolutions, tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

WORDS = 50
ROWS = 4
LENGTH = 12


class Labelled(nn.Module):
    """Words through a body to logits of the next word, and their loss."""

    def __init__(self, body: nn.Module, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        self.body = body
        self.head = nn.Linear(width, WORDS)

    def forward(self, words: Tensor, targets: Tensor) -> Tensor:
        hidden = self.body(self.embedding(words))
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return functional.cross_entropy(self.head(hidden).flatten(0, 1), targets.flatten())


class Translator(nn.Module):
    """nn.Transformer from words to words, with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 32)
        self.transformer = nn.Transformer(32, 4, 2, 2, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, WORDS)

    def forward(self, words: Tensor, targets: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(targets.shape[1])
        hidden = self.transformer(self.embedding(words), self.embedding(targets), tgt_mask=mask, tgt_is_causal=True)
        return functional.cross_entropy(self.head(hidden).flatten(0, 1), targets.flatten())


class UNet(nn.Module):
    """Two levels down and up again, with group norm, transposed convolutions and skips."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([_block(3, 16), _block(16, 32)])
        self.middle = _block(32, 64)
        self.widen = nn.ModuleList([nn.ConvTranspose2d(64, 32, 2, 2), nn.ConvTranspose2d(32, 16, 2, 2)])
        self.up = nn.ModuleList([_block(64, 32), _block(32, 16)])
        self.out = nn.Conv2d(16, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        hidden, skips = images, []
        for block in self.down:
            skips.append(block(hidden))
            hidden = functional.max_pool2d(skips[-1], 2)
        hidden = self.middle(hidden)
        for widen, block in zip(self.widen, self.up, strict=True):
            hidden = block(torch.cat([widen(hidden), skips.pop()], 1))
        return functional.mse_loss(self.out(hidden), images)


class Residual(nn.Module):
    """A small residual network with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)
            )
            for _ in range(3)
        )
        self.head = nn.Linear(16, 10)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        hidden = self.stem(images)
        for block in self.blocks:
            hidden = functional.relu(hidden + block(hidden))
        return functional.cross_entropy(self.head(hidden.mean((2, 3))), labels)


class Autoencoder(nn.Module):
    """A variational autoencoder, which draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 64), nn.SiLU(), nn.Linear(64, 16))
        self.decoder = nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 3 * 16 * 16))

    def forward(self, images: Tensor) -> Tensor:
        mean, log_variance = self.encoder(images).chunk(2, -1)
        drawn = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
        divergence = 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum(-1).mean()
        return functional.mse_loss(self.decoder(drawn), images.flatten(1)) + 1e-3 * divergence


class Mixer(nn.Module):
    """MLP-Mixer: linear layers across patches and across channels in turns."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, 4)
        self.across = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2))
        self.within = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(2)
        )
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        hidden = self.patches(images).flatten(2)
        for across, within in zip(self.across, self.within, strict=True):
            hidden = hidden + across(hidden)
            hidden = hidden + within(hidden.mT).mT
        return functional.cross_entropy(self.head(hidden.mean(-1)), labels)


class Tables(nn.Module):
    """A recommender: bags of embeddings, their pairwise products, and a tower."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(WORDS, 16, mode="sum") for _ in range(3))
        self.tower = nn.Sequential(nn.Linear(9, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, words: Tensor, labels: Tensor) -> Tensor:
        features = torch.stack([table(words) for table in self.tables], 1)
        products = torch.bmm(features, features.mT).flatten(1)
        return functional.binary_cross_entropy_with_logits(self.tower(products).squeeze(-1), labels.float() / 10)


class Spectrum(nn.Module):
    """Dilated convolutions over sound, to CTC's loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv1d(1 if i == 0 else 16, 16, 3, padding=2**i, dilation=2**i) for i in range(4)
        )
        self.head = nn.Conv1d(16, WORDS, 8, 8)

    def forward(self, sound: Tensor, targets: Tensor) -> Tensor:
        hidden = sound[:, None]
        for layer in self.layers:
            hidden = functional.gelu(layer(hidden))
        logits = self.head(hidden).log_softmax(1).permute(2, 0, 1)
        lengths = torch.full((logits.shape[1],), logits.shape[0])
        return functional.ctc_loss(
            logits, targets, lengths, torch.full_like(lengths, targets.shape[1]), zero_infinity=True
        )


class Stepwise(nn.Module):
    """A cell of a GRU, stepped in Python, with attention over what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 32)
        self.cell = nn.GRUCell(32, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, WORDS)

    def forward(self, words: Tensor, targets: Tensor) -> Tensor:
        hidden, states = torch.zeros(words.shape[0], 32, dtype=self.head.weight.dtype), []
        for word in self.embedding(words).unbind(1):
            hidden = self.cell(word, hidden)
            states.append(hidden)
        seen = torch.stack(states, 1)
        mixed, _ = self.attention(seen, seen, seen)
        return functional.cross_entropy(self.head(mixed).flatten(0, 1), targets.flatten())


def _block(wide: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(wide, out, 3, padding=1), nn.GroupNorm(4, out), nn.SiLU())


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
    return Labelled(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "nn.Transformer": Translator,
    "nn.TransformerEncoder": _encoder,
    "nn.LSTM": lambda: Labelled(nn.LSTM(32, 32, 2, batch_first=True)),
    "nn.GRU": lambda: Labelled(nn.GRU(32, 32, 2, batch_first=True)),
    "nn.RNN": lambda: Labelled(nn.RNN(32, 32, 2, batch_first=True)),
    "GRU cell with attention": Stepwise,
    "U-Net": UNet,
    "residual network": Residual,
    "variational autoencoder": Autoencoder,
    "MLP-Mixer": Mixer,
    "embedding tables": Tables,
    "dilated convolutions, CTC": Spectrum,
}


class TorchInputs:
    """Makes batches for one of MODELS, by the names of what its forward takes."""

    def __init__(self, model: nn.Module) -> None:
        self.names = model.forward.__code__.co_varnames[1 : model.forward.__code__.co_argcount]
        self.dtype = torch.float32

    def batch(self, seed: int) -> dict[str, Any]:
        """A batch drawn with this seed."""
        random = torch.Generator().manual_seed(seed)
        makers: dict[str, Callable[[], Tensor]] = {
            "words": lambda: torch.randint(1, WORDS, (ROWS, LENGTH), generator=random),
            "targets": lambda: torch.randint(1, WORDS, (ROWS, LENGTH), generator=random),
            "labels": lambda: torch.randint(0, 10, (ROWS,), generator=random),
            "images": lambda: torch.randn(ROWS, 3, 16, 16, generator=random).to(self.dtype),
            "sound": lambda: torch.randn(ROWS, 320, generator=random).to(self.dtype),
        }
        return {name: makers[name]() for name in self.names}
