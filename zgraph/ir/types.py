"""Types of values: dtype, shape, placement on the mesh, memory space, and whether the value is still on its way."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from zgraph.ir.symbols import Dim, render

__all__ = [
    "DEVICE",
    "HOST",
    "MAX_BLOCKS",
    "MODEL_AXES",
    "PLACEMENTS",
    "REDUCTIONS",
    "Axis",
    "DType",
    "Grouped",
    "Mesh",
    "NoneType",
    "Own",
    "Partial",
    "Placement",
    "Reduction",
    "Replicate",
    "ScalarType",
    "Shard",
    "TensorType",
    "Type",
    "Varying",
    "data_axes",
    "in_use",
    "model_axes",
    "num_data_ranks",
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


MAX_BLOCKS = 1024
"""Blocks that a dim may be cut in."""


@dataclass(frozen=True, slots=True)
class Replicate:
    """Every rank of the axis holds the same, whole value."""

    def __str__(self) -> str:
        return "R"


@dataclass(frozen=True, slots=True)
class Shard:
    """Rank r of the axis holds chunk r of tensor dim `dim`, or of each of several blocks of it.

    Along a data axis the chunks have ceil(size / N) rows each, the last ones fewer, and there is one block. Along a
    model axis every block divides by N.

    Args:
        dim: the tensor dim.
        blocks: the sizes of the blocks to one another: a fused projection of queries, keys and values is `(1, 1, 1)`,
            or `(4, 1, 1)` where four heads of queries share one of keys.
    """

    dim: int
    blocks: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        if not self.blocks or any(b < 1 for b in self.blocks):
            raise ValueError(f"blocks are sizes of 1 or more, not {self.blocks}")
        if (common := math.gcd(*self.blocks)) > 1:
            object.__setattr__(self, "blocks", tuple(b // common for b in self.blocks))

    def __str__(self) -> str:
        if len(self.blocks) == 1:
            return f"S{self.dim}"
        return f"S{self.dim}/{len(self.blocks) if len(set(self.blocks)) == 1 else [*self.blocks]}"

    def divides(self, size: Dim, num_ranks: int) -> bool:
        """Whether a dim of this size falls into such blocks, each of which divides by the ranks."""
        unit = sum(self.blocks)
        return isinstance(size, int) and not size % unit and all(size // unit * b % num_ranks == 0 for b in self.blocks)


Reduction = Literal["sum", "mean", "root", "max"]
"""Reduction that makes one value of the ranks' values: their sum, their mean, the first rank's, or the largest."""

REDUCTIONS: tuple[Reduction, ...] = ("sum", "mean", "root")
"""Reductions along data axes; along model axes there are `sum` and `max`."""


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


@dataclass(frozen=True, slots=True)
class Grouped:
    """Rank r of a model axis holds those slices of dim `dim` that belong to the groups whose matrices it has.

    The slices lie group by group, as running counts say that are a value of the graph. A rank has its own at the front,
    with room behind them for those of all groups; what is in that room means nothing.

    Args:
        dim: the tensor dim.
    """

    dim: int

    def __str__(self) -> str:
        return f"G{self.dim}"


@dataclass(frozen=True, slots=True)
class Own:
    """Rank r of a model axis holds the slices that it would have of dim `dim` as a shard, in an order of its own.

    The order depends on the data, as that of tokens by expert does. Of integers that number slices, each numbers one
    among the rank's own. Nothing moves such a value: it is put back in place by what is read by the inverse order.

    Args:
        dim: the tensor dim.
    """

    dim: int

    def __str__(self) -> str:
        return f"O{self.dim}"


Placement = Replicate | Shard | Partial | Varying | Grouped | Own

_WHOLE: tuple[Placement, ...] = (Replicate(), Varying(), *(Partial(r) for r in REDUCTIONS), Partial("max"))
PLACEMENTS: Mapping[str, Placement] = {str(p): p for p in _WHOLE}
"""The placements by their text, but for shards."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of the device mesh: its name and how many ranks lie along it."""

    name: str
    size: int


Mesh = tuple[Axis, ...]
"""The axes of a device mesh: model axes first, then data axes, of which at least one.

Along a *model axis* the ranks divide an op's work among them; along a *data axis* each has its own part of the batch.
Parameters are cut along the model axes first. What is left of each is sharded along the last data axis, and ranks along
the other data axes hold the same shards.
"""

MODEL_AXES = ("tensor", "context", "expert")
"""Names of the axes along which ranks divide the work of one op."""


def model_axes(mesh: Mesh) -> Mesh:
    """The axes along which ranks divide the work of one op."""
    return tuple(axis for axis in mesh if axis.name in MODEL_AXES)


def data_axes(mesh: Mesh) -> Mesh:
    """The axes along which each rank has its own part of the batch."""
    return tuple(axis for axis in mesh if axis.name not in MODEL_AXES)


def in_use(mesh: Mesh) -> Mesh:
    """The axes of more than one rank; with a model axis, a data axis too."""
    found = tuple(axis for axis in mesh if axis.size > 1)
    return (*found, Axis("shard", 1)) if found and not data_axes(found) else found


def num_data_ranks(mesh: Mesh) -> int:
    """Ranks along the data axes together: those whose gradients are reduced; 1 without a mesh."""
    return math.prod(axis.size for axis in data_axes(mesh))


def num_ranks(mesh: Mesh) -> int:
    """Ranks along all axes together; 1 without a mesh."""
    return math.prod(axis.size for axis in mesh)


def num_shards(mesh: Mesh) -> int:
    """Parts that a sharded tensor is cut into: the ranks of the last axis, a data axis."""
    return mesh[-1].size if mesh else 1


DEVICE, HOST = "device", "host"
"""The memory spaces: of the device, where ops compute; of the host, where values wait."""


@dataclass(frozen=True, slots=True)
class TensorType:
    """The type of a tensor value.

    `shape` is what an op reads and makes. Ops compute on whole tensors of shards along a data axis, so it is the global
    shape there. They compute on their own part along a model axis, and with `Varying` values, so it is the rank's own
    shape there. `strides` is None where the tensor is contiguous. `placement` has one entry a mesh axis (none where the
    graph has no mesh). `space` is the memory that it lies in: the device's, where ops compute, or the host's. `future`
    marks a value that a start op promises and a `wait` delivers.
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
        """Divisor that turns the sum over all data ranks into the reduced value.

        For a mean it is the number of ranks, for a sum the number of ranks that hold the same value.

        Args:
            sizes: the ranks along each data axis.
        """
        counts = tuple(sizes)
        own = self.placement[len(self.placement) - len(counts) :]
        return math.prod(n for p, n in zip(own, counts, strict=True) if p != Partial("sum"))

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
