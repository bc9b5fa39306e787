"""Costs of collectives: alpha-beta models, and the choice of the cheapest algorithm for a size and a topology.

A message costs alpha + bytes / bandwidth. With N ranks and a whole of B bytes (Thakur, Rabenseifner, Gropp:
"Optimization of Collective Communication Operations in MPICH", 2005; for the pipelined tree: Sanders, Speck, Traeff,
"Two-tree algorithms for full bandwidth broadcast, reduction and scan", 2009):

    ring                 (N - 1) alpha + (N - 1)/N B / bandwidth
    recursive halving    log2 N  alpha + (N - 1)/N B / bandwidth      (powers of two; neighbours share a host)
    tree                 2 log2 N alpha + 2 B / bandwidth             (all-reduce, broadcast half of it)
    hierarchical         across hosts for each place on a host, then within each host
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from zgraph.cost.hardware import Hardware, Link


@dataclass(frozen=True, slots=True)
class Quote:
    """The cheapest algorithm, and its time in microseconds."""

    algorithm: str
    us: float


COLLECTIVES = frozenset({"all_gather", "reduce_scatter", "all_reduce", "broadcast"})
"""Those whose algorithms are known; what else moves between ranks is taken as one message of each."""


@dataclass(frozen=True)
class Network:
    """The ranks of one mesh axis on a cluster.

    Args:
        hardware: the cluster's links.
        num_ranks: ranks of the axis.
        per_host: how many of them share a host.
    """

    hardware: Hardware
    num_ranks: int
    per_host: int

    @classmethod
    def of(cls, hardware: Hardware, num_ranks: int) -> Network:
        """`num_ranks` devices, full hosts first. Raises HardwareError where they do not fill hosts evenly."""
        return cls(hardware, num_ranks, hardware.spread(num_ranks)[1])

    @property
    def num_hosts(self) -> int:
        return self.num_ranks // self.per_host

    def direct_us(self, num_bytes: int) -> float:
        """Time for each rank to send `num_bytes` to others in one step, in microseconds."""
        return 0.0 if self.num_ranks == 1 else _steps(self._flat_link(), 1, num_bytes)

    def quote(self, op: str, whole_bytes: float) -> Quote:
        """The cheapest way to run a collective.

        Args:
            op: all_gather, reduce_scatter, all_reduce or broadcast.
            whole_bytes: bytes of the unsharded tensor.

        Raises:
            KeyError: `op` is none of them.
        """
        if self.num_ranks == 1:
            return Quote("none", 0.0)
        return min(self.quotes(op, whole_bytes), key=lambda q: q.us)

    def quotes(self, op: str, whole_bytes: float) -> tuple[Quote, ...]:
        """Every algorithm that can run a collective, with what it takes."""
        scatter = self._scatters(whole_bytes)
        if op in ("all_gather", "reduce_scatter"):
            return scatter
        rounds = math.ceil(math.log2(self.num_ranks))
        flat = self._flat_link()
        if op == "all_reduce":
            both = tuple(Quote(q.algorithm, 2 * q.us) for q in scatter)
            return (*both, Quote("tree", 2 * rounds * flat.latency_us + 2e6 * whole_bytes / flat.rate))
        return {"broadcast": (Quote("tree", rounds * flat.latency_us + 1e6 * whole_bytes / flat.rate),)}[op]

    def _scatters(self, whole_bytes: float) -> tuple[Quote, ...]:
        num_ranks, hosts, each = self.num_ranks, self.num_hosts, self.per_host
        across_bytes, inside_bytes = whole_bytes / each * (hosts - 1) / hosts, whole_bytes * (each - 1) / each
        within, between = self.hardware.within, self.hardware.between
        found = [Quote("ring", _steps(self._flat_link(), num_ranks - 1, whole_bytes * (num_ranks - 1) / num_ranks))]
        if num_ranks & (num_ranks - 1) == 0:
            across = _steps(between, hosts.bit_length() - 1, across_bytes)
            found.append(Quote("recursive halving", across + _steps(within, each.bit_length() - 1, inside_bytes)))
        if 1 < hosts < num_ranks:
            across = _steps(between, hosts - 1, across_bytes)
            found.append(Quote("hierarchical", across + _steps(within, each - 1, inside_bytes)))
        return tuple(found)

    def _flat_link(self) -> Link:
        """The link that an algorithm sees which does not know hosts.

        Its rings enter and leave a host over all its devices' network links at once.
        """
        within, between = self.hardware.within, self.hardware.between
        if self.num_hosts == 1:
            return within
        bytes_per_s = min(within.rate, self.per_host * between.rate)
        if self.per_host == 1:
            return between
        latency_us = (between.latency_us + (self.per_host - 1) * within.latency_us) / self.per_host
        return Link(bytes_per_s=bytes_per_s, latency_us=latency_us, share=1.0)


def _steps(link: Link, num_messages: int, num_bytes: float) -> float:
    """Microseconds for messages one after the other that carry `num_bytes` in all."""
    return num_messages * link.latency_us + 1e6 * num_bytes / link.rate
