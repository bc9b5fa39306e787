"""The cache of keys and values: a slot for each row of a batch, a place for each token, at fixed addresses.

A row's tokens lie at places 0, 1, ... without padding between them, whatever padding they came with. One more place at
the end takes what belongs to no token: padding, and rows that have ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from zgraph.errors import PlacementError
from zgraph.ir.arena import ALIGN_BYTES

EPS = 1e-12
"""The smallest scale."""

LARGEST = 127
"""The largest integer."""

TensorShape = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class LayerShape:
    """Keys and values that one layer keeps of a token.

    Args:
        num_heads: of keys and values.
        key_dim, value_dim: numbers a head.
        dtype: that they are computed in.
        is_rounded: whether they are kept in int8, with a scale for each head of each token.
    """

    num_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    is_rounded: bool = False

    def tensors(self, num_rows: int, num_places: int) -> dict[str, TensorShape]:
        """The tensors of a layer's cache by name, [rows, heads, places, dim]."""
        found: dict[str, TensorShape] = {}
        for what, dim in (("keys", self.key_dim), ("values", self.value_dim)):
            size = num_rows, self.num_heads, num_places
            found[what] = (*size, dim), torch.int8 if self.is_rounded else self.dtype
            if self.is_rounded:
                found[f"{what}_scale"] = (*size, 1), self.dtype
        return found

    def part(self, num_ranks: int) -> LayerShape:
        """The part that each of so many ranks keeps: some of the heads.

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
        memory: the layer's tensors, as `LayerShape.tensors` has them.
        places: [rows, tokens], where this call's tokens go.
    """

    is_compileable = True
    is_sliding = False

    def __init__(self, memory: Mapping[str, torch.Tensor], places: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values, self.memory, self.places = memory["keys"], memory["values"], memory, places
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the memory is there."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a call's keys and values, [rows, heads, tokens, dim], to their places; all places of all rows."""
        return self._updated("keys", key_states), self._updated("values", value_states)

    def _updated(self, what: str, states: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(states.shape[0], device=self.places.device)[:, None]
        at = (rows, slice(None), self.places)  # no index of heads: each rank may have some of them
        held, scales = self.memory[what], self.memory.get(f"{what}_scale")
        if scales is None:
            held[at] = states.transpose(1, 2)
            return held
        data, scale = rounded(states)
        held[at], scales[at] = data.transpose(1, 2), scale.transpose(1, 2)
        return restored(held, scales)

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


def rounded(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys or values as int8, and a scale for each head of each token, [..., 1], in the dtype of both."""
    wide, kind = states.float(), torch.finfo(states.dtype)
    scale = (wide.abs().amax(-1, keepdim=True) / LARGEST).clamp_min(max(EPS, kind.tiny)).to(states.dtype)
    return (wide / scale.float()).round().clamp(-LARGEST, LARGEST).to(torch.int8), scale


def restored(data: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Keys or values as they come back from int8, in the dtype of their scales."""
    return data.to(scale.dtype) * scale


def memories(shapes: Sequence[LayerShape], tensors: Sequence[torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of each layer by name, from those of all layers in turn."""
    left = iter(tensors)
    for shape in shapes:
        yield {name: next(left) for name in shape.tensors(0, 0)}


def slot_cache(shapes: Sequence[LayerShape], tensors: Sequence[torch.Tensor], places: torch.Tensor) -> Cache:
    """The cache that a model is called with.

    Args:
        shapes: of the layers.
        tensors: of each layer in turn.
        places: [rows, tokens].
    """
    return Cache(layers=[SlotLayer(memory, places) for memory in memories(shapes, tensors)])


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
        name: what names begin with.

    Attributes:
        named: the tensors of each layer in turn, by name: `cache.0.keys` and so on.
        num_bytes: of the block.
    """

    def __init__(
        self, layers: Sequence[LayerShape], num_rows: int, num_places: int, device: torch.device, name: str = "cache"
    ) -> None:
        sizes = {
            f"{name}.{number}.{what}": size
            for number, layer in enumerate(layers)
            for what, size in layer.tensors(num_rows, num_places).items()
        }
        offsets, end = [], 0
        for shape, dtype in sizes.values():
            offsets.append(end)
            end += -(-torch.Size(shape).numel() * dtype.itemsize // ALIGN_BYTES) * ALIGN_BYTES
        self.num_bytes, self.device = end, device
        self._block = torch.zeros(end, dtype=torch.uint8, device=device)
        self.named = {
            key: self._block[at : at + torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(shape)
            for at, (key, (shape, dtype)) in zip(offsets, sizes.items(), strict=True)
        }

    def row(self, row: int) -> dict[str, torch.Tensor]:
        """The tensors of one slot, by name."""
        return {name: tensor[row : row + 1] for name, tensor in self.named.items()}

    def resize(self, *, is_there: bool) -> None:
        """Take the memory, filled with zeros, or give it back; the tensors stay the same."""
        self._block.untyped_storage().resize_(self.num_bytes if is_there else 0)
        if is_there:
            self._block.zero_()
