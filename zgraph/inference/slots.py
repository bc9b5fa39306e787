"""The cache of keys and values: a slot for each row of a batch, a place for each token, at fixed addresses.

A row's tokens lie at places 0, 1, ... without padding between them, whatever padding they came with. One more place at
the end takes what belongs to no token: padding, and rows that have ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from zgraph.errors import PlacementError
from zgraph.ir.arena import ALIGN_BYTES


@dataclass(frozen=True)
class LayerShape:
    """Keys and values that one layer keeps of a token.

    Args:
        num_heads: of keys and values.
        key_dim, value_dim: numbers a head.
        dtype: of them.
    """

    num_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    def part(self, num_ranks: int) -> LayerShape:
        """What each of so many ranks keeps: some of the heads.

        Raises:
            PlacementError: the heads do not divide.
        """
        if self.num_heads % num_ranks:
            raise PlacementError(
                f"a layer's {self.num_heads} heads of keys and values do not divide over {num_ranks} ranks; take a "
                "tensor_parallel= that divides them"
            )
        return replace(self, num_heads=self.num_heads // num_ranks)


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of the cache, as transformers' models call it.

    Args:
        keys, values: [rows, heads, places, dim].
        places: [rows, tokens], where this call's tokens go.
    """

    is_compileable = True
    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, places: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values, self.places = keys, values, places
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the memory is there."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a call's keys and values, [rows, heads, tokens, dim], to their places; all places of all rows."""
        assert self.keys is not None
        assert self.values is not None
        rows = torch.arange(key_states.shape[0], device=self.places.device)[:, None]
        at = (rows, slice(None), self.places)  # no index of heads: each rank may have some of them
        self.keys[at], self.values[at] = key_states.transpose(1, 2), value_states.transpose(1, 2)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All places, the first of them at 0."""
        return self.get_max_length(), 0

    def get_seq_length(self) -> int:
        """Zero: positions are told to the model, row by row."""
        return 0

    def get_max_length(self) -> int:
        """The number of places."""
        assert self.keys is not None
        return self.keys.shape[2]


def slot_cache(tensors: Sequence[torch.Tensor], places: torch.Tensor) -> Cache:
    """The cache that a model is called with.

    Args:
        tensors: keys and values of each layer in turn, [rows, heads, places, dim].
        places: [rows, tokens].
    """
    pairs = zip(tensors[::2], tensors[1::2], strict=True)
    return Cache(layers=[SlotLayer(keys, values, places) for keys, values in pairs])


def layer_shapes(cache: object) -> list[LayerShape] | str:
    """The shapes of a cache's layers, from one that a model has filled; or why it is no cache of keys and values."""
    if not isinstance(cache, Cache) or not len(cache):
        return "it gives no cache of keys and values; use the model's own generate"
    found = []
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        plain = isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor) and keys.dim() == 4
        if not plain or hasattr(layer, "conv_states"):
            return f"it keeps a {type(layer).__name__}, no plain cache of keys and values; use the model's own generate"
        assert keys is not None
        assert values is not None
        found.append(LayerShape(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype))
    return found


class Arena:
    """One block of memory with a place for each tensor of the cache.

    Args:
        layers: what they keep of a token.
        num_rows: slots.
        num_places: tokens a slot.
        device: where it is.

    Attributes:
        tensors: keys and values of each layer in turn, [rows, heads, places, dim].
        num_bytes: of the block.
    """

    def __init__(self, layers: Sequence[LayerShape], num_rows: int, num_places: int, device: torch.device) -> None:
        sizes = [
            ((num_rows, layer.num_heads, num_places, dim), layer.dtype)
            for layer in layers
            for dim in (layer.key_dim, layer.value_dim)
        ]
        offsets, end = [], 0
        for shape, dtype in sizes:
            offsets.append(end)
            end += -(-torch.Size(shape).numel() * dtype.itemsize // ALIGN_BYTES) * ALIGN_BYTES
        self.num_bytes = end
        self._block = torch.zeros(end, dtype=torch.uint8, device=device)
        self.tensors = [
            self._block[at : at + torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(shape)
            for at, (shape, dtype) in zip(offsets, sizes, strict=True)
        ]

    def resize(self, *, is_there: bool) -> None:
        """Take the memory, filled with zeros, or give it back; the tensors stay the same."""
        self._block.untyped_storage().resize_(self.num_bytes if is_there else 0)
        if is_there:
            self._block.zero_()
