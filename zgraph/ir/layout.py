"""How a tensor lies in memory, how it is cut into shards, and how shards lie side by side in a bucket.

A tensor sharded on its dim 0 over N ranks is cut as `torch.chunk` cuts it: ceil(d0 / N) rows a rank, the last ranks
get fewer or none. In buffers each rank's part is padded to the same number of elements, its *chunk*, so that every
rank sends as much as every other. A bucket is the chunks of its members one after the other, each starting at a
multiple of 16 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from zgraph.errors import VerifyError
from zgraph.ir.symbols import Dim, simplify
from zgraph.ir.types import TensorType

MEMBER_ALIGN_BYTES = 16
"""Members of a bucket or a flat buffer begin at multiples of it."""


def dense_strides(shape: tuple[Dim, ...], order: Sequence[int] | None = None) -> tuple[Dim, ...]:
    """The strides of a tensor without gaps whose dims lie in memory in this order, the last one fastest."""
    strides: list[Dim] = [1] * len(shape)
    size: Dim = 1
    for dim in reversed(range(len(shape)) if order is None else order):
        strides[dim] = size
        size = size * shape[dim]
    return tuple(strides)


def is_contiguous(shape: tuple[Dim, ...], strides: tuple[Dim, ...]) -> bool:
    """Whether these are the strides of a dense tensor; dims of one element, and tensors of none, may have any."""
    steps = zip(shape, strides, dense_strides(shape), strict=True)
    return 0 in shape or all(size == 1 or stride == dense for size, stride, dense in steps)


def chunk_rows(rows: int, num_ranks: int) -> int:
    """Rows of a full chunk of a tensor with `rows` rows."""
    return -(-rows // num_ranks)


def local_rows(rows: int, num_ranks: int, rank: int) -> int:
    """Rows that `rank` really holds, padding left out."""
    chunk = chunk_rows(rows, num_ranks)
    return max(0, min(chunk, rows - chunk * rank))


def chunk_numel(shape: tuple[Dim, ...], num_ranks: int) -> int:
    """Elements of one rank's padded chunk. A tensor without dims counts as one row."""
    rows, *rest = shape or (1,)
    return chunk_rows(concrete(rows), num_ranks) * math.prod(concrete(d) for d in rest)


def is_even(shape: tuple[Dim, ...], num_ranks: int) -> bool:
    """Whether dim 0 divides, so that the chunks of all ranks end to end are the tensor itself."""
    return concrete((shape or (1,))[0]) % num_ranks == 0


def concrete(dim: Dim) -> int:
    """`dim` as an int. Only parameters are sharded, and their sizes are always known.

    Raises:
        VerifyError: it is a symbol.
    """
    value = simplify(dim)
    if not isinstance(value, int):
        raise VerifyError(f"a sharded tensor must have known sizes, not {dim}: give numbers, or do not shard it")
    return value


@dataclass(frozen=True, slots=True)
class BucketLayout:
    """Where each member's chunk starts in one rank's part of a bucket, and how long that part is, in elements."""

    offsets: tuple[int, ...]
    chunks: tuple[int, ...]
    part_numel: int


def bucket_layout(members: Iterable[TensorType], num_ranks: int) -> BucketLayout:
    """The layout of a bucket of `members`, which share one dtype."""
    offsets, chunks, end = [], [], 0
    for member in members:
        align = max(1, MEMBER_ALIGN_BYTES // member.dtype.itemsize)
        offsets.append(-(-end // align) * align)
        chunks.append(chunk_numel(member.shape, num_ranks))
        end = offsets[-1] + chunks[-1]
    return BucketLayout(tuple(offsets), tuple(chunks), end)


Span = tuple[int, int]
"""Where a run of indices of a dim begins, and how long it is."""


def cut_spans(spans: Sequence[Span], count: int, rank: int, blocks: int = 1) -> list[Span]:
    """The runs of indices that a rank of `count` has of these runs, end to end, of a cut in so many blocks."""
    extent = sum(length for _, length in spans) // blocks
    rows = chunk_rows(extent, count)
    found: list[Span] = []
    for block in range(blocks):
        found += span_within(spans, (block * extent + rank * rows, min(rows, max(extent - rank * rows, 0))))
    return found


def span_within(spans: Sequence[Span], wanted: Span) -> list[Span]:
    """The parts of runs, end to end, that a run of their indices covers."""
    found: list[Span] = []
    at, (first, length) = 0, wanted
    for start, size in spans:
        low, high = max(first, at), min(first + length, at + size)
        if low < high:
            found.append((start + low - at, high - low))
        at += size
    return found
