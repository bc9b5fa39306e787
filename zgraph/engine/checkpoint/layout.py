"""Where each part of a tensor is, computed from how it is cut over a mesh of ranks: nobody has to be asked.

An axis of the mesh cuts one dim, in one block or in several (a DTensor's `_StridedShard`), or has copies. Each rank's
part is a product of runs of indices, one list of runs a dim. Which ranks have something of a box is found axis by axis,
without a look at the others, so that it costs the same among 8 ranks and among 4,096.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import product
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from zgraph.errors import CheckpointError
from zgraph.ir.layout import Span, chunk_rows, cut_spans, local_rows

MOST_BLOCKS = 1 << 12
"""Of one cut. A file that says more is not believed."""

Spans = list[list[Span]]
"""For each dim the runs of indices that are held, in the order in which they are held."""

Place = tuple[slice, ...]


class Piece(NamedTuple):
    """A box that a part that is stored and a part that is wanted have in common: its place in each."""

    stored: Place
    wanted: Place


class Layout(BaseModel):
    """How a tensor is cut over ranks.

    Args:
        mesh: how many ranks each axis has; as many in all as the checkpoint has.
        cuts: for each axis the dim that it cuts and in how many blocks; None where it has copies.
        ranks: the ranks of the mesh, the last axis fastest; empty where they are 0, 1, 2 and so on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mesh: tuple[PositiveInt, ...]
    cuts: tuple[tuple[NonNegativeInt, Annotated[PositiveInt, Field(le=MOST_BLOCKS)]] | None, ...]
    ranks: tuple[NonNegativeInt, ...] = ()

    @model_validator(mode="after")
    def _is_of_one_mesh(self) -> Layout:
        if len(self.cuts) != len(self.mesh):
            raise ValueError("a cut for each axis of the mesh")
        if self.ranks and (len(self.ranks) != self.num_ranks or {*self.ranks} != {*range(self.num_ranks)}):
            raise ValueError("the ranks of the mesh are not each of all ranks once")
        return self

    @property
    def num_ranks(self) -> int:
        return math.prod(self.mesh)

    @property
    def num_copies(self) -> int:
        """How many ranks have the same part."""
        return math.prod(size for size, cut in zip(self.mesh, self.cuts, strict=True) if cut is None)

    def fits(self, shape: Sequence[int], num_ranks: int) -> bool:
        """Whether a tensor of this shape can be cut so: blocks divide what each rank has left of a dim at that axis."""
        if self.num_ranks != num_ranks:
            return False
        extents = [{size} for size in shape]
        for size, cut in zip(self.mesh, self.cuts, strict=True):
            if cut is None:
                continue
            dim, blocks = cut
            if dim >= len(shape) or any(extent % blocks for extent in extents[dim]):
                return False
            extents[dim] = {blocks * rows for extent in extents[dim] for rows in _chunks(extent // blocks, size)}
        return True

    def spans(self, shape: Sequence[int], rank: int) -> Spans:
        """Runs of indices that a rank has of a tensor."""
        found: Spans = [[(0, size)] for size in shape]
        for size, cut, coordinate in zip(self.mesh, self.cuts, self._coordinate(rank), strict=True):
            if cut is not None:
                found[cut[0]] = cut_spans(found[cut[0]], size, coordinate, cut[1])
        return found

    def writes(self, shape: Sequence[int], copy: int, rank: int) -> bool:
        """Whether a rank writes its part, where of all copies this one is written: it has some of the tensor."""
        number = 0
        for size, cut, coordinate in zip(self.mesh, self.cuts, self._coordinate(rank), strict=True):
            number = number * size + coordinate if cut is None else number
        return number == copy and all(num_indices(runs) for runs in self.spans(shape, rank))

    def parts(self, shape: Sequence[int], copy: int, wanted: Spans) -> Iterator[tuple[int, Spans]]:
        """The ranks that write something of what is wanted, and what each has; none where nothing is wanted."""
        if not all(map(num_indices, wanted)):
            return
        copies: list[int] = []
        for size, cut in zip(reversed(self.mesh), reversed(self.cuts), strict=True):
            copies.append(copy % size if cut is None else 0)
            copy = copy // size if cut is None else copy
        for coordinate, spans in self._descend(shape, wanted, copies[::-1], [], [[(0, size)] for size in shape]):
            number = 0
            for size, at in zip(self.mesh, coordinate, strict=True):
                number = number * size + at
            yield self.ranks[number] if self.ranks else number, spans

    def _descend(
        self, shape: Sequence[int], wanted: Spans, copies: Sequence[int], above: list[int], spans: Spans
    ) -> Iterator[tuple[list[int], Spans]]:
        axis = len(above)
        if axis == len(self.mesh):
            yield above, spans
            return
        cut, size = self.cuts[axis], self.mesh[axis]
        if cut is None:
            yield from self._descend(shape, wanted, copies, [*above, copies[axis]], spans)
            return
        dim, blocks = cut
        for coordinate in _candidates(spans[dim], wanted[dim], size, blocks):
            own = cut_spans(spans[dim], size, coordinate, blocks)
            if any(_overlaps(run, other) for run in own for other in wanted[dim]):
                below = [*spans[:dim], own, *spans[dim + 1 :]]
                yield from self._descend(shape, wanted, copies, [*above, coordinate], below)

    @cached_property
    def _places(self) -> dict[int, int]:
        """The place in the mesh of each rank, where they are not in order."""
        return {rank: place for place, rank in enumerate(self.ranks)}

    def _coordinate(self, rank: int) -> list[int]:
        number = self._places[rank] if self.ranks else rank
        found: list[int] = []
        for size in reversed(self.mesh):
            number, at = divmod(number, size)
            found.append(at)
        return found[::-1]


def _chunks(rows: int, count: int) -> set[int]:
    """How many rows ranks have of a plain cut of so many: a full chunk, what is left of one, or nothing."""
    full = chunk_rows(rows, count)
    last = rows // full if full else 0
    return {local_rows(rows, count, rank) for rank in (0, min(last, count - 1), count - 1)}


def _candidates(spans: Sequence[Span], wanted: Sequence[Span], count: int, blocks: int) -> range:
    """Ranks along an axis that may have some of what is wanted."""
    if blocks > 1 or len(spans) != 1 or not wanted:
        return range(count)
    (start, length) = spans[0]
    rows = max(chunk_rows(length, count), 1)
    low, high = min(first for first, _ in wanted) - start, max(first + n for first, n in wanted) - start
    return range(max(low // rows, 0), min(-(-high // rows), count))


def _overlaps(one: Span, other: Span) -> bool:
    return one[0] < other[0] + other[1] and other[0] < one[0] + one[1]


def num_indices(runs: Sequence[Span]) -> int:
    """How many indices of a dim these runs have."""
    return sum(length for _, length in runs)


def sizes_of(spans: Spans) -> tuple[int, ...]:
    """The shape of what is held."""
    return tuple(map(num_indices, spans))


def pieces(stored: Spans, wanted: Spans) -> Iterator[Piece]:
    """The boxes that are in both, as places in each."""
    dims = [list(_common(here, there)) for here, there in zip(stored, wanted, strict=True)]
    for found in product(*dims):
        yield Piece(
            tuple(slice(at, at + length) for at, _, length in found),
            tuple(slice(at, at + length) for _, at, length in found),
        )


def _common(stored: Sequence[Span], wanted: Sequence[Span]) -> Iterator[tuple[int, int, int]]:
    """Of each run of indices in both: where it is in the one, where in the other, and how long it is."""
    at = 0
    for start, length in stored:
        there = 0
        for first, size in wanted:
            low, high = max(start, first), min(start + length, first + size)
            if low < high:
                yield at + low - start, there + low - first, high - low
            there += size
        at += length


def copies_to_write(tensors: Mapping[str, tuple[Layout, int]]) -> dict[str, int]:
    """Which copy of each tensor is written, so that the ranks write about as much: the largest first, each by those who
    have least to write so far.

    Args:
        tensors: their layouts, and the bytes of a part.
    """
    loads: dict[int, list[tuple[int, int]]] = {}
    found: dict[str, int] = {}
    for name, (layout, num_bytes) in sorted(tensors.items(), key=lambda item: (-item[1][1], item[0])):
        count = layout.num_copies
        load = loads.setdefault(count, [(0, copy) for copy in range(count)])
        written, copy = load[0]
        heapq.heapreplace(load, (written + num_bytes, copy))
        found[name] = copy
    return found


def checked_ranks(ranks: Sequence[int], members: Sequence[int]) -> tuple[int, ...]:
    """The places of a mesh's ranks among the members of a checkpoint; empty where they are in order.

    Raises:
        CheckpointError: the mesh is of other ranks.
    """
    if list(ranks) == list(members):
        return ()
    places: dict[Any, int] = {rank: at for at, rank in enumerate(members)}
    if len(ranks) != len(members) or any(rank not in places for rank in ranks):
        raise CheckpointError(
            f"a tensor is on a mesh of {len(ranks)} ranks, and the checkpoint is of {len(members)}: give the mesh of "
            "the model to what is made beside it"
        )
    return tuple(places[rank] for rank in ranks)
