"""Joining the ranks that a launcher has started: one that dies meanwhile is missed within seconds.

torch's own rendezvous waits for every rank until its limit, half an hour, and asks nobody whether they live. Here each
rank first writes its heartbeat into the store; the first rank listens to them until all have come.
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
from zgraph.runtime.beats import Beat, beat_key
from zgraph.runtime.circle import rank_names
from zgraph.runtime.departures import LINGER_SECONDS
from zgraph.runtime.heartbeat import BEAT_SECONDS, GONE_AFTER_SECONDS, Heartbeat, heartbeat
from zgraph.runtime.questions import peek, read_all
from zgraph.runtime.store_errors import store_errors

_RULING, _FAILED = "ruling", "who is to blame"
_CAME, _ALL_CAME, _JOINED = "came", "all came", "joined"
_AGAIN = "Start the job again."
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

    They enter a list as they come. The first rank listens to all that are in it, and rules that they can go on when the
    last has come. The others wait for that, and listen to the first: one question a beat.

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
                ruling = self._ruling(limit_s)
            if ruling != _ALL_HERE:
                raise PeerError(ruling)
            try:
                yield
                enter(self.store, _JOINED, self.rank)
            except RuntimeError as error:
                raise PeerError(self._blame() or f"the ranks could not be joined: {error}") from None
        finally:
            self.heartbeat.stop()

    def _ruling(self, limit_s: float) -> str:
        """The ruling that all have come, or cannot come any more, which all of them read."""
        self.store.compare_set(beat_key(self.rank), "", str(Beat(0)))  # before it is in the list
        if enter(self.store, _CAME, self.rank) == self.num_ranks:
            self.store.set(_ALL_CAME, "")
        until = time.monotonic() + limit_s + GONE_AFTER_SECONDS * (self.rank > 0)  # the first's limit may begin later
        found = ""
        key = _RULING if self.rank else _ALL_CAME
        with self.heartbeat.ears.listen(key, f"rank {self.rank} ended while the ranks joined. {_AGAIN}") as ear:
            while not found and not ear.over.wait(min(BEAT_SECONDS, max(until - time.monotonic(), 0.0))):
                self._listen(entered(self.store, _CAME) if self.rank == 0 else [0])
                found = _died(self._gone()) or self._absent(until, limit_s)
                if found:
                    self.store.compare_set(_RULING, "", found)
        if self.rank:
            return ear.word()
        self.store.compare_set(_RULING, "", found or ear.word() or _ALL_HERE)
        if found:
            time.sleep(LINGER_SECONDS)  # the store may end with this process: let the others read first
        return self.store.get(_RULING).decode()

    def _absent(self, until: float, limit_s: float) -> str:
        """Which ranks have not come, once it is time; else nothing."""
        if time.monotonic() < until:
            return ""
        here = {*entered(self.store, _CAME)} if self.rank == 0 else {*range(1, self.num_ranks)}
        return _absent(sorted({*range(self.num_ranks)} - here), self.num_ranks, limit_s)

    def _blame(self) -> str:
        """Ranks that died on the way; nothing if none did. The first to fail looks for them, and tells the others."""
        with store_errors(), self.heartbeat.ears.listen(_FAILED, " ") as ear:
            if self.store.add("failed", 1) > 1:
                ear.over.wait(3 * GONE_AFTER_SECONDS)
            else:
                self._heard.clear()
                until = time.monotonic() + 2 * GONE_AFTER_SECONDS
                while time.monotonic() < until and not self._gone():  # those that have joined send no heartbeat in here
                    self._listen({*entered(self.store, _CAME)} - {*entered(self.store, _JOINED)})
                    time.sleep(BEAT_SECONDS)
                self.store.compare_set(_FAILED, "", f"{_died(self._gone())} ")
        with store_errors():
            return ear.word().strip()

    def _listen(self, ranks: Iterable[int]) -> None:
        """Note the last beat of each of these ranks, and when it was new."""
        keys = {rank: beat_key(rank) for rank in ranks}
        words = (
            read_all(self.store, [*keys.values()]) if len(keys) > 1 else [peek(self.store, k) for k in keys.values()]
        )
        for rank, beat in zip(keys, words, strict=True):
            if beat and beat != self._heard.get(rank, (b"", 0.0))[0]:
                self._heard[rank] = beat, time.monotonic()

    def _gone(self) -> list[int]:
        now = time.monotonic()
        return [r for r, (_, since) in self._heard.items() if r != self.rank and now - since > GONE_AFTER_SECONDS]


def enter(store: Store, name: str, rank: int) -> int:
    """Put a rank at the end of a list in the store; the length of the list then."""
    count = store.add(f"{name}/count", 1)
    store.set(f"{name}/{count}", str(rank))
    return count


def entered(store: Store, name: str) -> list[int]:
    """The ranks in a list, in the order in which they came."""
    keys = [f"{name}/{number + 1}" for number in range(store.add(f"{name}/count", 0))]
    return [int(word) for word in read_all(store, keys) if word]  # a rank may be on its way in


def _died(gone: list[int]) -> str:
    return f"{rank_names(gone)} died while the ranks joined. {_AGAIN}" if gone else ""


def _absent(ranks: list[int], num_ranks: int, limit_s: float) -> str:
    return (
        f"{rank_names(ranks)} of {num_ranks} did not come within {limit_s:g} s: look whether each was started, or set "
        "ZGRAPH_TIMEOUT to more seconds"
    )
