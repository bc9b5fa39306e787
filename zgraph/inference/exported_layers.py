"""Linear layers and tables of embeddings in int8, as files for other runtimes have them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from zgraph.codegen import quantised
from zgraph.inference.layers import is_turned, linear_layers, rows_of

Dequantise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From int8 [outputs, columns] and scales, fp32 [outputs, 1], to fp32 [outputs, columns]."""


def scaled(data: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The numbers of integers, by ops of torch."""
    return data.float() * scale


class _Int8Linear(nn.Module):
    """A linear layer whose weight is int8, as `zgraph.codegen.quantised.to_int8` gives it."""

    data: torch.Tensor
    scale: torch.Tensor

    def __init__(self, data: torch.Tensor, scale: torch.Tensor, layer: Any, dequantise: Dequantise) -> None:
        super().__init__()
        self.register_buffer("data", data)
        self.register_buffer("scale", scale)
        self.bias, self.dtype, self.dequantise = layer.bias, layer.weight.dtype, dequantise
        self.turns = is_turned(layer)

    @property
    def weight(self) -> torch.Tensor:
        """Numbers that the integers stand for, as the layer had them: some modules read those of their children."""
        rows = self.dequantise(self.data, self.scale).to(self.dtype)
        return rows.t() if self.turns else rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.dequantise(self.data, self.scale).to(self.dtype), self.bias)


class _Int8Embedding(nn.Module):
    """A table of embeddings in int8."""

    data: torch.Tensor
    scale: torch.Tensor

    def __init__(self, data: torch.Tensor, scale: torch.Tensor, layer: Any) -> None:
        super().__init__()
        self.register_buffer("data", data)
        self.register_buffer("scale", scale)
        self.dtype = layer.weight.dtype

    @property
    def weight(self) -> torch.Tensor:
        """Numbers that the integers stand for."""
        return (self.data.float() * self.scale).to(self.dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return (F.embedding(ids, self.data).float() * F.embedding(ids, self.scale)).to(self.dtype)


def in_int8(model: nn.Module, dequantise: Dequantise) -> nn.Module:
    """A copy of a model whose linear layers and embeddings are in int8; the rest of its memory is shared with it."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    found = copy.deepcopy(model, shared)
    integers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    made: dict[int, nn.Module] = {}
    linear = {id(layer) for layer in linear_layers(found).values()}
    every = list(found.named_modules(remove_duplicate=False))
    layers: list[tuple[str, Any]] = [(n, m) for n, m in every if id(m) in linear or type(m) is nn.Embedding]
    for _, layer in layers:
        is_linear = id(layer) in linear
        if id(layer.weight) not in integers:
            rows = rows_of(layer) if is_linear else layer.weight.detach()
            integers[id(layer.weight)] = quantised.to_int8(rows.contiguous(), 1)
        if id(layer) not in made:
            both = integers[id(layer.weight)]
            made[id(layer)] = _Int8Linear(*both, layer, dequantise) if is_linear else _Int8Embedding(*both, layer)
    for name, layer in layers:
        if not name:
            return made[id(layer)]
        home, _, last = name.rpartition(".")
        setattr(found.get_submodule(home), last, made[id(layer)])
    return found
