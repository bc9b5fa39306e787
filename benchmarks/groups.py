"""Ops between matmuls, as small modules with the shapes of known models, and their inputs.

Each is one group that `kernels="triton"` fuses, with or without the matmuls around it. `others` of a group are torch's
own ways to the same numbers, where it has one that a model must be written for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import NewGELUActivation
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

Make = Callable[[], Any]


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, and the batch that it is given."""

    model: str
    batch: int
    tokens: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    words: int = 0

    @property
    def head(self) -> int:
        return self.width // self.heads


LLAMA = Shape("Llama-3 8B", 2, 4096, 4096, 14336, 32, 8, 128_256)
GPT2 = Shape("GPT-2 XL", 8, 1024, 1600, 6400, 25, 25, 50_257)
VIT = Shape("ViT-L", 64, 197, 1024, 4096, 16, 16)


def tiny(shape: Shape) -> Shape:
    """Sizes that a processor is done with at once."""
    return replace(shape, batch=2, tokens=5, width=64, inner=96, heads=4, kv_heads=2, words=shape.words and 300)


@dataclass(frozen=True)
class Group:
    """A module and its inputs; both are made on torch's default device, in its default dtype.

    draws: whether it has a dropout, which keeps other numbers in each system, so that results cannot be compared.
    """

    name: str
    shape: Shape
    module: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    others: Mapping[str, Callable[[], nn.Module]] = field(default_factory=dict)
    draws: bool = False


# --- modules -------------------------------------------------------------------------------------------------------


class ResidualNorm(nn.Module):
    """A sublayer's output is added to the stream, which the next one reads normalised."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, stream: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
        stream = stream + made
        return stream, self.norm(stream)


class BiasNorm(nn.Module):
    """A bias and a residual sum between a matmul and a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias, self.norm = nn.Parameter(torch.randn(width)), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.norm(x + self.bias)
        return made


class SwiGlu(nn.Module):
    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up


class GatedMlp(nn.Module):
    """As Llama's."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return made


class Mlp(nn.Module):
    """As GPT-2's and ViT's."""

    def __init__(self, width: int, inner: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, inner), nn.Linear(inner, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.last(self.activation(self.first(x)))
        return made


class Epilogue(torch.autograd.Function):
    """`torch._addmm_activation`, which on NVIDIA's GPUs is cuBLASLt's matmul with bias and activation at its end.

    It keeps nothing from before the activation, so that the backward of a GELU does the matmul again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, use_gelu: bool) -> Tensor:
        made: Tensor = torch._addmm_activation(bias, x, weight.t(), use_gelu=use_gelu)
        ctx.save_for_backward(x, weight, bias, *([] if use_gelu else [made]))
        return made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, bias, *made = ctx.saved_tensors
        if made:
            gradient = torch.ops.aten.threshold_backward(gradient, made[0], 0)
        else:
            kind = "tanh" if x.is_cuda else "none"  # as the op itself does
            gradient = torch.ops.aten.gelu_backward(gradient, torch.addmm(bias, x, weight.t()), approximate=kind)
        return gradient @ weight, gradient.t() @ x, gradient.sum(0), None


class EpilogueMlp(Mlp):
    """The same with an epilogue in the first matmul."""

    def forward(self, x: Tensor) -> Tensor:
        use_gelu = not isinstance(self.activation, nn.ReLU)
        made = Epilogue.apply(x.flatten(0, -2), self.first.weight, self.first.bias, use_gelu)  # type: ignore[no-untyped-call]
        out: Tensor = self.last(made).view_as(x)
        return out


class Scores(nn.Module):
    """The middle of an attention that is computed as a matrix: scores to what is kept of their softmax."""

    mask: Tensor | None

    def __init__(self, scale: float, tokens: int, *, causal: bool, dropout: float = 0.1) -> None:
        super().__init__()
        self.scale, self.dropout = scale, dropout
        low = torch.finfo(torch.get_default_dtype()).min
        self.register_buffer("mask", torch.full((tokens, tokens), low).triu(1) if causal else None)

    def forward(self, scores: Tensor) -> Tensor:
        scores = scores * self.scale
        if self.mask is not None:
            scores = scores + self.mask
        return F.dropout(F.softmax(scores, -1), self.dropout, self.training)


class Turn(nn.Module):
    """Rotary embeddings of queries and keys, which come from their projections and go to the attention."""

    def __init__(self, head: int) -> None:
        super().__init__()
        self.head = head

    def forward(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        query, key = (x.view(*x.shape[:2], -1, self.head).transpose(1, 2) for x in (query, key))
        turned: tuple[Tensor, Tensor] = apply_rotary_pos_emb(query, key, cos, sin)
        return turned


class Head(nn.Module):
    """The last projection and the loss, as transformers computes it: in fp32 from the logits on."""

    def __init__(self, width: int, words: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, words, bias=False)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.project(x).float(), target)


class LinearLoss(Head):
    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        made: Tensor = F.linear_cross_entropy(x, self.project.weight, target)
        return made


# --- groups --------------------------------------------------------------------------------------------------------


def groups(*, is_tiny: bool = False) -> list[Group]:
    """All of them, in the order of the table."""
    llama, gpt2, vit = (tiny(s) if is_tiny else s for s in (LLAMA, GPT2, VIT))
    found = [
        Group(
            "residual + rmsnorm",
            llama,
            lambda: ResidualNorm(LlamaRMSNorm(llama.width)),
            _stream(llama, 2),
            {"torch rms_norm": lambda: ResidualNorm(nn.RMSNorm(llama.width, 1e-6))},
        ),
        Group("swiglu", llama, SwiGlu, _inner(llama, 2)),
        Group("swiglu mlp", llama, lambda: GatedMlp(llama.width, llama.inner), _stream(llama, 1)),
        Group("rotary", llama, lambda: Turn(llama.head), lambda: _queries(llama)),
        Group(
            "linear + cross-entropy",
            llama,
            lambda: Head(llama.width, llama.words),
            lambda: _predicted(llama),
            {"torch linear_cross_entropy": lambda: LinearLoss(llama.width, llama.words)},
        ),
    ]
    for shape in (gpt2, vit):
        is_gpt2 = shape is gpt2
        activation = NewGELUActivation if is_gpt2 else nn.GELU
        found += [
            Group("residual + layernorm", shape, _residual_layernorm(shape), _stream(shape, 2)),
            Group("bias + layernorm", shape, _bias_layernorm(shape), _stream(shape, 1)),
            Group(
                "gelu",
                shape,
                activation,
                _inner(shape, 1),
                {"torch gelu, tanh": lambda: nn.GELU("tanh")} if is_gpt2 else {},
            ),
            _mlp("gelu mlp", shape, activation),
            Group(
                "scale + mask + softmax + dropout" if is_gpt2 else "scale + softmax + dropout",
                shape,
                _scores(shape, causal=is_gpt2),
                _squares(shape),
                draws=True,
            ),
        ]
    return [*found, _mlp("relu mlp", vit, nn.ReLU)]


def _residual_layernorm(shape: Shape) -> Make:
    return lambda: ResidualNorm(nn.LayerNorm(shape.width))


def _bias_layernorm(shape: Shape) -> Make:
    return lambda: BiasNorm(shape.width)


def _mlp(name: str, shape: Shape, activation: Make) -> Group:
    others = {"torch _addmm_activation": lambda: EpilogueMlp(shape.width, shape.inner, activation())}
    return Group(name, shape, lambda: Mlp(shape.width, shape.inner, activation()), _stream(shape, 1), others)


def _scores(shape: Shape, *, causal: bool) -> Make:
    return lambda: Scores(shape.head**-0.5, shape.tokens, causal=causal)


def _stream(shape: Shape, number: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: _given(number, shape.batch, shape.tokens, shape.width)


def _inner(shape: Shape, number: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: _given(number, shape.batch, shape.tokens, shape.inner)


def _squares(shape: Shape) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: _given(1, shape.batch, shape.heads, shape.tokens, shape.tokens)


def _queries(shape: Shape) -> tuple[Tensor, ...]:
    query, key = (_given(1, shape.batch, shape.tokens, n * shape.head)[0] for n in (shape.heads, shape.kv_heads))
    rates = 500_000.0 ** (-torch.arange(0, shape.head, 2, dtype=torch.float32) / shape.head)
    angles = torch.arange(shape.tokens, dtype=torch.float32)[None, :, None] * torch.cat([rates, rates])
    return query, key, *(f(angles).to(query.dtype) for f in (torch.cos, torch.sin))


def _predicted(shape: Shape) -> tuple[Tensor, ...]:
    num_tokens = shape.batch * shape.tokens
    return *_given(1, num_tokens, shape.width), torch.randint(shape.words, (num_tokens,))


def _given(number: int, *shape: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape, requires_grad=True) for _ in range(number))
