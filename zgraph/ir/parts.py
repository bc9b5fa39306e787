"""Parts of tensors along a model axis: their shapes, and how they lie in memory.

On two ranks, `S1/3` is the half of each of three blocks of dim 1:

    f32[32, 96]<R>  ->  f32[32, 48]<S1/3>           columns 0-15, 32-47, 64-79 on rank 0; the others on rank 1

Dims lie in memory in the order in which they did, as what is made of parts lies: a transposed matrix, cut, is the
transpose of a cut one.
"""

from __future__ import annotations

from dataclasses import replace

from zgraph.ir.layout import is_contiguous
from zgraph.ir.symbols import Dim, simplify
from zgraph.ir.types import Own, Placement, Replicate, Shard, TensorType

__all__ = ["part_along", "part_shape", "placed_along", "whole_along", "whole_shape"]


def placed_along(kind: TensorType, index: int, place: Placement) -> TensorType:
    """The type with another placement along axis number `index` of the mesh, and all else as it is."""
    return kind.at(*kind.placement[:index], place, *kind.placement[index + 1 :])


def part_along(kind: TensorType, index: int, num_ranks: int, place: Placement) -> TensorType:
    """The type of what each rank of a model axis has of a tensor that is replicated along it.

    Args:
        kind: the tensor's type.
        index: the number of the axis in the mesh.
        num_ranks: ranks along the axis.
        place: how the tensor is placed along it then.

    Raises:
        ValueError: the dim does not divide.
    """
    made = placed_along(kind, index, place)
    if not isinstance(place, Shard | Own):
        return made
    as_shard = place if isinstance(place, Shard) else Shard(place.dim)
    if place.dim >= len(kind.shape) or not as_shard.divides(kind.shape[place.dim], num_ranks):
        raise ValueError(f"{kind} does not divide into {place} on {num_ranks} ranks")
    return _resized(made, place.dim, 1, num_ranks)


def whole_along(kind: TensorType, index: int, num_ranks: int) -> TensorType:
    """The type of a tensor whose parts along a model axis are put together."""
    place = kind.placement[index]
    made = placed_along(kind, index, Replicate())
    return _resized(made, place.dim, num_ranks, 1) if isinstance(place, Shard | Own) else made


def part_shape(shape: tuple[Dim, ...], place: Placement, num_ranks: int) -> tuple[Dim, ...]:
    """The shape of a rank's part of a tensor of this shape."""
    if not isinstance(place, Shard):
        return shape
    return (*shape[: place.dim], simplify(shape[place.dim]) // num_ranks, *shape[place.dim + 1 :])


def whole_shape(shape: tuple[Dim, ...], place: Placement, num_ranks: int) -> tuple[Dim, ...]:
    """The shape of the tensor of which a rank's part has this shape."""
    if not isinstance(place, Shard):
        return shape
    return (*shape[: place.dim], shape[place.dim] * num_ranks, *shape[place.dim + 1 :])


def _resized(kind: TensorType, dim: int, times: int, over: int) -> TensorType:
    """The type with one dim `times / over` as large, and with it the strides that step over all of that dim."""
    shape = (*kind.shape[:dim], kind.shape[dim] * times // over, *kind.shape[dim + 1 :])
    if kind.strides is None or kind.strides[dim] == 0:
        return replace(kind, shape=shape)
    extent = kind.shape[dim] * kind.strides[dim]
    strides = tuple(
        stride * times // over if other != dim and _steps_over(stride, extent) else stride
        for other, stride in enumerate(kind.strides)
    )
    return replace(kind, shape=shape, strides=None if is_contiguous(shape, strides) else strides)


def _steps_over(stride: Dim, extent: Dim) -> bool:
    """Whether a stride is as large as the extent of a dim, or larger; of symbols, whether it is a multiple of it."""
    stride, extent = simplify(stride), simplify(extent)
    if isinstance(stride, int) and isinstance(extent, int):
        return stride >= extent
    return bool(getattr(simplify(stride / extent), "is_integer", True))
