"""Types of values: dtype, shape, placement on the mesh, memory space, and whether the value is still on its way."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from zgraph.ir.symbols import Dim, render

__all__ = [
    "DEVICE",
    "HOST",
    "PLACEMENTS",
    "REDUCTIONS",
    "Axis",
    "DType",
    "Mesh",
    "NoneType",
    "Partial",
    "Placement",
    "Reduction",
    "Replicate",
    "ScalarType",
    "Shard",
    "TensorType",
    "Type",
    "Varying",
    "num_ranks",
    "num_shards",
]


class DType(enum.Enum):
    """An element type. Its value is its name in text; `itemsize` is in bytes."""

    f64 = "f64"
    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    f8e4m3 = "f8e4m3"
    f8e5m2 = "f8e5m2"
    c64 = "c64"
    c128 = "c128"
    i64 = "i64"
    i32 = "i32"
    i16 = "i16"
    i8 = "i8"
    u8 = "u8"
    u16 = "u16"
    u32 = "u32"
    u64 = "u64"
    bool = "bool"

    @property
    def itemsize(self) -> int:
        return _ITEMSIZES[self]


def _itemsize(name: str) -> int:
    digits = "".join(c for c in name.split("e")[0] if c.isdigit())
    return int(digits) // 8 if digits else 1


_ITEMSIZES = {dtype: _itemsize(dtype.value) for dtype in DType}


@dataclass(frozen=True, slots=True)
class Replicate:
    """Every rank of the axis holds the same, whole value."""

    def __str__(self) -> str:
        return "R"


@dataclass(frozen=True, slots=True)
class Shard:
    """Rank r of the axis holds chunk r of tensor dim `dim`: ceil(size / N) rows each, the last ones shorter."""

    dim: int

    def __str__(self) -> str:
        return f"S{self.dim}"


Reduction = Literal["sum", "mean", "root"]
"""Reduction that makes one value of the ranks' values: their sum, their mean, or the first rank's."""

REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)


@dataclass(frozen=True, slots=True)
class Partial:
    """The value meant is a reduction of what the ranks of the axis hold, which is pending."""

    reduce: Reduction

    def __str__(self) -> str:
        return f"P({self.reduce})"


@dataclass(frozen=True, slots=True)
class Varying:
    """Each rank of the axis has its own value, computed from its part of the batch, and nothing is pending."""

    def __str__(self) -> str:
        return "V"


Placement = Replicate | Shard | Partial | Varying

_WHOLE: tuple[Placement, ...] = (Replicate(), Varying(), *(Partial(r) for r in REDUCTIONS))
PLACEMENTS: Mapping[str, Placement] = {str(p): p for p in _WHOLE}
"""The placements by their text, but for shards."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of the device mesh: its name and how many ranks lie along it."""

    name: str
    size: int


Mesh = tuple[Axis, ...]
"""The axes of a device mesh. Tensors are sharded along the last; ranks along the others hold the same shards."""


def num_ranks(mesh: Mesh) -> int:
    """Ranks along all axes together; 1 without a mesh."""
    return math.prod(axis.size for axis in mesh)


def num_shards(mesh: Mesh) -> int:
    """Parts that a sharded tensor is cut into: the ranks of the last axis."""
    return mesh[-1].size if mesh else 1


DEVICE, HOST = "device", "host"
"""The memory spaces: of the device, where ops compute; of the host, where values wait."""


@dataclass(frozen=True, slots=True)
class TensorType:
    """The type of a tensor value.

    `shape` is the global shape; for a placement of `Varying` it is each rank's own. `strides` is None where the
    tensor is contiguous. `placement` has one entry a mesh axis (none where the graph has no mesh). `space` is the
    memory that it lies in: the device's, where ops compute, or the host's. `future` marks a value that a start op
    promises and a `wait` delivers.
    """

    dtype: DType
    shape: tuple[Dim, ...]
    strides: tuple[Dim, ...] | None = None
    placement: tuple[Placement, ...] = ()
    space: str = DEVICE
    future: bool = False

    def __str__(self) -> str:
        dims = ", ".join(render(d) for d in self.shape)
        strides = "" if self.strides is None else " | " + ", ".join(render(d) for d in self.strides)
        placement = f"<{', '.join(map(str, self.placement))}>" if self.placement else ""
        space = "" if self.space == DEVICE else f"@{self.space}"
        return f"{'future ' if self.future else ''}{self.dtype.value}[{dims}{strides}]{placement}{space}"

    @property
    def numel(self) -> Dim:
        return math.prod(self.shape)

    @property
    def is_sharded(self) -> bool:
        """Whether each rank of the last mesh axis holds a part of it."""
        return bool(self.placement) and isinstance(self.placement[-1], Shard)

    @property
    def varies(self) -> bool:
        """Whether ranks have different values."""
        return Varying() in self.placement

    @property
    def reduction(self) -> Reduction | None:
        """The reduction that is pending; None where none is, or another along each axis."""
        found = {p.reduce for p in self.placement if isinstance(p, Partial)}
        return found.pop() if len(found) == 1 else None

    def divisor(self, sizes: Iterable[int]) -> int:
        """Divisor that turns the sum over all ranks into the reduced value.

        For a mean it is the number of ranks, for a sum the number of ranks that hold the same value.

        Args:
            sizes: the ranks along each axis.
        """
        return math.prod(n for p, n in zip(self.placement, sizes, strict=True) if p != Partial("sum"))

    def at(self, *placement: Placement) -> TensorType:
        """The same tensor at another placement."""
        return replace(self, placement=placement)

    def reduced(self) -> TensorType:
        """The same tensor with what was pending reduced: the same on all ranks."""
        return self.at(*(Replicate() if isinstance(p, Partial) else p for p in self.placement))

    def on(self, space: str) -> TensorType:
        """The same tensor in another memory space."""
        return replace(self, space=space)

    @property
    def is_on_host(self) -> bool:
        """Whether it lies in the host's memory."""
        return self.space == HOST

    def contiguous(self, dtype: DType | None = None) -> TensorType:
        """The same shape and placement laid out densely, in `dtype` if one is given."""
        return replace(self, dtype=dtype or self.dtype, strides=None)

    def promised(self) -> TensorType:
        """The future of this type."""
        return replace(self, future=True)

    def delivered(self) -> TensorType:
        """Type of the value that waiting for this future gives."""
        return replace(self, future=False)


@dataclass(frozen=True, slots=True)
class ScalarType:
    """A number outside a tensor: `kind` is int, float or bool; `expr` its symbolic value where it is known."""

    kind: str
    expr: Dim | None = None

    def __str__(self) -> str:
        return self.kind if self.expr is None else f"{self.kind}({render(self.expr)})"


@dataclass(frozen=True, slots=True)
class NoneType:
    """The type of a result slot that an op leaves empty (a gradient that was masked out, say)."""

    def __str__(self) -> str:
        return "none"


Type = TensorType | ScalarType | NoneType
