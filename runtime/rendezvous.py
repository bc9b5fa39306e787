"""Joining the ranks that a launcher has started: one that dies meanwhile is missed within seconds.

torch's own rendezvous waits for every rank until its limit, half an hour, and asks nobody whether they live. Here each
rank first writes its heartbeat into the store; the first rank looks on until all have come, and tells the others.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed.rendezvous import rendezvous

from zgraph.bridge import private_runtime
from zgraph.bridge.private_runtime import PrefixStore, Store, default_pg_timeout
from zgraph.environment import environment
from zgraph.errors import PeerError, UsageError
from zgraph.runtime.departures import LINGER_SECONDS
from zgraph.runtime.heartbeat import BEAT_SECONDS, Heartbeat, beat_key, heartbeat
from zgraph.runtime.peers import GONE_AFTER_SECONDS, rank_names
from zgraph.runtime.store_errors import store_errors

_RULING = "ruling"
_ALL_HERE = "all are here"
_DAY_S = 86_400.0


def join_ranks(
    backend: str, init_method: str = "env://", rank: int = -1, num_ranks: int = -1, timeout: timedelta | None = None
) -> None:
    """Make torch's default process group of the ranks that a launcher has started.

    Args:
        backend, init_method: as `torch.distributed.init_process_group` takes them.
        rank, num_ranks: this one, and how many there are; by default what the environment says, as torchrun sets it.
        timeout: of collectives; by default torch's own.

    Raises:
        UsageError: nothing says where the ranks meet.
        PeerError: a rank died while the others joined, or has not come within ZGRAPH_TIMEOUT seconds.
    """
    limit_s = min(environment().timeout_s, _DAY_S)
    try:
        store, rank, num_ranks = next(rendezvous(init_method, rank, num_ranks, timeout=timedelta(seconds=limit_s)))
    except ValueError as error:
        raise UsageError(f"{error}. Start the script with torchrun, which sets what it needs") from None
    except RuntimeError as error:
        raise PeerError(f"the ranks did not meet within {limit_s:g} s: {error}") from None
    with _Rendezvous(PrefixStore("zgraph/join", store), rank, num_ranks).watched(limit_s):
        private_runtime.init_group(backend, store, rank, num_ranks, timeout)
        store.set_timeout(timeout or default_pg_timeout)
    heartbeat(private_runtime.store(), rank)  # from now on: whoever waits for this rank can tell whether it lives


class _Rendezvous:
    """Ranks on their way into a process group.

    Args:
        store: where they meet.
        rank, num_ranks: this one, and how many are to come.
    """

    def __init__(self, store: Store, rank: int, num_ranks: int) -> None:
        self.store, self.rank, self.num_ranks = store, rank, num_ranks
        self.heartbeat = Heartbeat(store, rank)
        self._heard: dict[int, tuple[bytes, float]] = {}

    @contextmanager
    def watched(self, limit_s: float) -> Iterator[None]:
        """Go on when all have come. What fails then is because of those who have died since.

        Raises:
            PeerError: a rank is gone, or has not come.
        """
        try:
            with store_errors():
                ruling = self._rule(limit_s) if self.rank == 0 else self._await_ruling(limit_s)
            if ruling != _ALL_HERE:
                raise PeerError(ruling)
            try:
                yield
                self.store.set(_joined(self.rank), "")
            except RuntimeError as error:
                raise PeerError(self._blame() or f"the ranks could not be joined: {error}") from None
        finally:
            self.heartbeat.stop()

    def _rule(self, limit_s: float) -> str:
        """The first rank's ruling once all have come, or cannot come any more; the others read it."""
        everyone, until = range(self.num_ranks), time.monotonic() + limit_s
        self._listen(everyone)
        while len(self._heard) < self.num_ranks and not self._gone() and time.monotonic() < until:
            time.sleep(BEAT_SECONDS / 10)
            self._listen(everyone)
        absent = [rank for rank in everyone if rank not in self._heard]
        ruling = _died(self._gone()) or (absent and _absent(absent, self.num_ranks, limit_s)) or _ALL_HERE
        self.store.set(_RULING, ruling)
        if ruling != _ALL_HERE:
            time.sleep(LINGER_SECONDS)  # the store may end with this process: let the others read first
        return ruling

    def _await_ruling(self, limit_s: float) -> str:
        until = time.monotonic() + limit_s + GONE_AFTER_SECONDS  # the first rank's limit may begin later
        while not self.store.check([_RULING]):
            self._listen([0])
            if self._gone():
                return _died([0])
            if time.monotonic() > until:
                return _absent([0], self.num_ranks, limit_s)
            time.sleep(BEAT_SECONDS / 10)
        return self.store.get(_RULING).decode()

    def _blame(self) -> str:
        """Ranks that died on the way; nothing if none did. Those that have joined send no heartbeat in here."""
        self._heard.clear()
        until = time.monotonic() + 2 * GONE_AFTER_SECONDS
        with store_errors():
            on_the_way = [rank for rank in range(self.num_ranks) if not self.store.check([_joined(rank)])]
            while time.monotonic() < until and not self._gone():
                self._listen(on_the_way)
                time.sleep(BEAT_SECONDS)
        return _died(self._gone())

    def _listen(self, ranks: Iterable[int]) -> None:
        """Note the last beat of each rank that has come, and when it was new."""
        for rank in ranks:
            key = beat_key(rank)
            beat = bytes(self.store.get(key)) if self.store.check([key]) else b""
            if beat and beat != self._heard.get(rank, (b"", 0.0))[0]:
                self._heard[rank] = beat, time.monotonic()

    def _gone(self) -> list[int]:
        now = time.monotonic()
        return [r for r, (_, since) in self._heard.items() if r != self.rank and now - since > GONE_AFTER_SECONDS]


def _joined(rank: int) -> str:
    return f"joined/{rank}"


def _died(gone: list[int]) -> str:
    return f"{rank_names(gone)} died while the ranks joined. Start the job again." if gone else ""


def _absent(ranks: list[int], num_ranks: int, limit_s: float) -> str:
    return (
        f"{rank_names(ranks)} of {num_ranks} did not come within {limit_s:g} s: look whether each was started, or set "
        "ZGRAPH_TIMEOUT to more seconds"
    )
