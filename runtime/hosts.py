"""Hosts, and which ranks share one: rows of ranks that are near one another."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Hosts:
    """Which ranks share a host: row h holds the ranks of host h, each row as many."""

    rows: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, names: Sequence[str]) -> Hosts:
        """The hosts of ranks that run on the hosts of these names; each rank its own where hosts are of unequal size.

        >>> Hosts.of(["a", "a", "b", "b"]).rows
        ((0, 1), (2, 3))
        >>> Hosts.of(["a", "a", "b"]).rows
        ((0,), (1,), (2,))
        """
        rows = [tuple(r for r, n in enumerate(names) if n == name) for name in dict.fromkeys(names)]
        if len({len(row) for row in rows}) > 1:
            rows = [(rank,) for rank in range(len(names))]
        return cls(tuple(rows))

    @classmethod
    def rows_of(cls, num_ranks: int, each: int) -> Hosts:
        """Ranks in rows of `each`, one after the other.

        >>> Hosts.rows_of(4, 2).rows
        ((0, 1), (2, 3))
        """
        return cls(tuple(tuple(range(first, first + each)) for first in range(0, num_ranks, each)))

    def place(self, rank: int) -> tuple[int, int]:
        """The number of a rank's host, and its place there."""
        return next((h, row.index(rank)) for h, row in enumerate(self.rows) if rank in row)


def host_name() -> str:
    """A name that processes share if they run on one host, with one network."""
    network = os.readlink("/proc/self/ns/net") if os.path.exists("/proc/self/ns/net") else ""
    return f"{socket.gethostname()} {network}"
