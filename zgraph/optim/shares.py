"""Which rank works on which matrix, and when: a function of shapes, so that all ranks find the same.

Each matrix has an owner, chosen by its work: the largest first, each to the rank with the least (Graham: "Bounds on
multiprocessing timing anomalies", 1969).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from zgraph.ir.layout import chunk_rows, local_rows

Round = tuple[tuple[int, ...], ...]
"""The numbers of the matrices that each rank works on."""

MIN_ROUNDS = 4
"""Of a rank's share, however small: one that came in a single round would have nothing to hide behind."""


@dataclass(frozen=True)
class Matrix:
    """What is known of a matrix on all ranks.

    Args:
        rows: of the whole.
        columns: all dimensions but the first.
        is_sharded: whether each rank holds some of the rows, and not all.
        work: of whoever owns it, in any unit.
    """

    rows: int
    columns: int
    is_sharded: bool
    work: int

    def travelling_numel(self, num_ranks: int) -> int:
        """The most elements that its owner has alive of it at once: the rows of all ranks side by side."""
        return self.rows * self.columns * (1 if self.is_sharded else num_ranks)

    def span(self, rank: int, num_ranks: int) -> slice:
        """The rows that a rank holds."""
        if not self.is_sharded:
            return slice(0, self.rows)
        start = min(rank * chunk_rows(self.rows, num_ranks), self.rows)
        return slice(start, start + local_rows(self.rows, num_ranks, rank))


def owners(works: Sequence[int], num_ranks: int) -> list[list[int]]:
    """The numbers of the matrices that each rank owns, those with the most work first.

    >>> owners([1, 5, 3, 2], 2)
    [[1, 0], [2, 3]]
    """
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for number in sorted(range(len(works)), key=lambda n: -works[n]):
        rank = loads.index(min(loads))
        shares[rank].append(number)
        loads[rank] += works[number]
    return shares


def rounds(matrices: Sequence[Matrix], num_ranks: int, max_numel: int) -> list[Round]:
    """All matrices, each in one round, where each rank owns at most `max_numel` travelling elements, or one matrix."""
    shares = owners([m.work for m in matrices], num_ranks)
    sizes = [[matrices[n].travelling_numel(num_ranks) for n in share] for share in shares]
    limit = min(max_numel, math.ceil(max(map(sum, sizes), default=0) / MIN_ROUNDS))
    columns = [_cut(share, some, limit) for share, some in zip(shares, sizes, strict=True)]
    count = max(map(len, columns), default=0)
    return [tuple(c[at] if at < len(c) else () for c in columns) for at in range(count)]


def _cut(share: Sequence[int], sizes: Sequence[int], limit: int) -> list[tuple[int, ...]]:
    found: list[list[int]] = []
    room = 0
    for number, size in zip(share, sizes, strict=True):
        if not found or size > room:
            found.append([])
            room = limit
        found[-1].append(number)
        room -= size
    return [tuple(some) for some in found]
