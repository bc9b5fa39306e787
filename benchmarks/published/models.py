"""Transformers as the published steps train them: Llama's block and GPT's, in plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Sizes:
    """Sizes of a transformer.

    Args:
        is_gated: Llama's block: RMSNorm, rotary positions, a gated MLP. GPT's otherwise: LayerNorm, GELU.
        num_kv: heads of keys and values.
        num_positions: learned, of a GPT: the length of a sequence.
        has_bias: whether linear layers of a GPT have biases, and dropout behind them.
        is_unfused: whether a GPT's attention is made of matmuls and one softmax, as in Megatron of 2021.
        checkpointed: what is computed again: "none", "full", or "every other" layer.
    """

    num_layers: int
    hidden: int
    num_heads: int
    num_kv: int
    inner: int
    vocabulary: int
    is_gated: bool
    num_positions: int = 0
    has_bias: bool = False
    is_unfused: bool = False
    checkpointed: str = "none"


class Transformer(nn.Module):
    """Decoder with its loss: `forward(tokens, labels)`, both [batch, sequence]."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        block = Gated if sizes.is_gated else Plain
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.hidden)
        self.layers = nn.ModuleList(block(sizes) for _ in range(sizes.num_layers))
        self.norm: nn.Module = RMSNorm(sizes.hidden) if sizes.is_gated else nn.LayerNorm(sizes.hidden)
        if not sizes.is_gated:
            self.positions = nn.Parameter(torch.zeros(sizes.num_positions, sizes.hidden))
        self.head = nn.Linear(sizes.hidden, sizes.vocabulary, bias=False)
        if not sizes.is_gated:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, labels: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if not self.sizes.is_gated:
            x = x + self.positions
        for layer in self.layers:
            if self.sizes.checkpointed == "full":
                x = checkpoint(layer, x, cos, sin, use_reentrant=False)
            else:
                x = layer(x, cos, sin)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


class RMSNorm(nn.Module):
    """Zhang, Sennrich: "Root Mean Square Layer Normalization", 2019."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * self.weight


class Gated(nn.Module):
    """Llama's block (Touvron et al., 2023)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.num_heads, self.num_kv = sizes.num_heads, sizes.num_kv
        self.size = sizes.hidden // sizes.num_heads
        self.norm1, self.norm2 = RMSNorm(sizes.hidden), RMSNorm(sizes.hidden)
        self.query = nn.Linear(sizes.hidden, sizes.hidden, bias=False)
        self.key = nn.Linear(sizes.hidden, sizes.num_kv * self.size, bias=False)
        self.value = nn.Linear(sizes.hidden, sizes.num_kv * self.size, bias=False)
        self.out = nn.Linear(sizes.hidden, sizes.hidden, bias=False)
        self.gate = nn.Linear(sizes.hidden, sizes.inner, bias=False)
        self.up = nn.Linear(sizes.hidden, sizes.inner, bias=False)
        self.down = nn.Linear(sizes.inner, sizes.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (
            linear(h).view(*x.shape[:2], -1, self.size).transpose(1, 2) for linear in (self.query, self.key, self.value)
        )
        q, k = _turned(q, cos, sin), _turned(k, cos, sin)
        if self.num_kv != self.num_heads:
            k, v = (t.repeat_interleave(self.num_heads // self.num_kv, dim=1) for t in (k, v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(a.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half, other = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-other, half), dim=-1) * sin


class Plain(nn.Module):
    """GPT's block (Radford et al., 2019), and MPT's without biases and dropout."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.num_heads, self.is_unfused = sizes.num_heads, sizes.is_unfused
        self.dropout = 0.1 if sizes.has_bias else 0.0
        hidden, bias = sizes.hidden, sizes.has_bias
        self.norm1, self.norm2 = nn.LayerNorm(hidden, bias=bias), nn.LayerNorm(hidden, bias=bias)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden, bias=bias), nn.Linear(hidden, hidden, bias=bias)
        self.up, self.down = nn.Linear(hidden, sizes.inner, bias=bias), nn.Linear(sizes.inner, hidden, bias=bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            t.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        a = self.unfused(q, k, v) if self.is_unfused else F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.dropout(self.out(a.transpose(1, 2).flatten(2)), self.dropout)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm2(x)))), self.dropout)

    def unfused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention by matmuls. Megatron's softmax masks and scales in the same kernel, so neither is an op here."""
        return F.dropout(torch.softmax(q @ k.transpose(2, 3), dim=-1), self.dropout) @ v
