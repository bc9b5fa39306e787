"""Which copies a job goes on from: the newest of which all ranks' shards are somewhere."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from zgraph.engine.checkpoint.memory.shelf import Mark
from zgraph.runtime.circle import NAMED, rank_names


@dataclass(frozen=True)
class Copy:
    """A copy that a rank has found whole on its host.

    Args:
        mark: of the copy.
        rank: whose shards it has.
        num_ranks: that there were.
        checksum: of the index.
        holder: the rank that has found it.
    """

    mark: Mark
    rank: int
    num_ranks: int
    checksum: int
    holder: int


@dataclass(frozen=True)
class Choice:
    """Copies of one step, one of each rank.

    Args:
        mark: of all of them.
        checksum: of their index.
        holders: the rank that has found each.
    """

    mark: Mark
    checksum: int
    holders: Mapping[int, int]


def choose(copies: Iterable[Copy]) -> tuple[Choice | None, str]:
    """The newest copies that are complete, and in words what the newest of all lack; empty if these are complete.

    Those of one mark with another index are never put together.
    """
    found: dict[Mark, dict[tuple[int, int], dict[int, int]]] = defaultdict(lambda: defaultdict(dict))
    for copy in copies:
        holders = found[copy.mark][copy.checksum, copy.num_ranks]
        holders[copy.rank] = min(copy.holder, holders.get(copy.rank, copy.holder))
    lack = ""
    for mark in sorted(found, reverse=True):
        for (checksum, num_ranks), holders in sorted(found[mark].items()):
            missing = [rank for rank in range(num_ranks) if rank not in holders]
            if not missing:
                return Choice(mark, checksum, holders), lack
            lack = lack or f"of step {mark.step} there is no copy of {_named(missing)}"
    return None, lack


def neighbours(hosts: Sequence[str]) -> dict[int, int]:
    """For each rank the one that keeps its copy: on the next host, at the same place. None where there is one host.

    >>> neighbours(["a", "a", "b", "b"])
    {0: 2, 1: 3, 2: 0, 3: 1}
    >>> neighbours(["a", "a", "b"])
    {0: 2, 1: 2, 2: 0}
    """
    rows: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        rows.setdefault(host, []).append(rank)
    if len(rows) < 2:
        return {}
    ordered = [*rows.values()]
    keepers: dict[int, int] = {}
    for at, row in enumerate(ordered):
        beyond = ordered[(at + 1) % len(ordered)]
        keepers |= {rank: beyond[place % len(beyond)] for place, rank in enumerate(row)}
    return dict(sorted(keepers.items()))


def _named(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - NAMED} others" if len(ranks) > NAMED else ""
    return f"{rank_names(ranks[:NAMED])}{more}"
