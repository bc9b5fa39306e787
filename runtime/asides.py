"""Meetings of a thread beside training: ranks that agree through the store, while their main threads do something else.

What the heartbeat says of this rank stays what its main thread does. A thread that waits here has connections of its
own to the store, and uses no collective.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from zgraph.bridge.private_runtime import store
from zgraph.environment import environment
from zgraph.errors import PeerError
from zgraph.runtime.circle import AGAIN
from zgraph.runtime.drift import Wait
from zgraph.runtime.elsewhere import Seen
from zgraph.runtime.heartbeat import heartbeat
from zgraph.runtime.meetings import Meetings
from zgraph.runtime.questions import Ears

PATIENCE = 6
"""How many times ZGRAPH_TIMEOUT a thread waits for those of other ranks: to write large files takes some ranks long."""


class Aside(Meetings):
    """Ranks of which a thread each meets those of the others. One thread of a rank uses it at a time.

    Args:
        rank: this one.
        ranks: all of them, in an order that is the same on each.
        name: the same on all of them, and used for nothing else.
        what: they meet about, for messages.
    """

    def __init__(self, rank: int, ranks: tuple[int, ...], name: str, what: str) -> None:
        super().__init__(heartbeat(store(), rank), ranks, name, environment().timeout_s)
        self.ears = Ears(self.store)
        self._what, self._number = what, 0

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in their order, of values that JSON has.

        Raises:
            PeerError: a rank failed, ended or is gone, or does not come in time.
        """
        self._number += 1
        what = f"{self._what}/{self._number}"
        found = self.exchange_values(what, value, num_limits=PATIENCE)
        self._have_read(what)  # before the process ends that keeps the store
        if self.rank == self.ranks[0] and self._number > 1:
            self._forget(f"{self._what}/{self._number - 1}")
        return found

    def _forget(self, what: str) -> None:
        """Remove the keys of a meeting that all have left, as they came to the next."""
        stem = self._key(what)
        keys = [
            *(f"{stem}/{rank}" for rank in self.ranks),
            f"{stem}/came",
            f"{stem}/ruling",
            f"{self.name}/read/{what}",
        ]
        with suppress(RuntimeError):  # a store that cannot forget, or that is gone
            for key in keys:
                self.store.delete_key(key)

    def look(self, wait: Wait, what: str, seen: Seen) -> None:
        """Look whether the others will come: what their main threads wait for does not matter.

        Raises:
            PeerError: a rank failed, ended, or is gone.
        """
        wait.looks += 1
        self.check(what)

    def check(self, what: str) -> None:
        """Look whether all ranks are there.

        Args:
            what: is waited for.

        Raises:
            PeerError: a rank failed, ended, or is gone.
        """
        self.raise_failure()
        if left := self.departed():
            ends = "; ".join(f"rank {rank} {alarm.text}" for rank, alarm in left.items())
            self._end(PeerError(f"{ends}, while rank {self.rank} waits for {what}. {AGAIN}"))
        if gone := self.silent():
            self.blame(what, TimeoutError("no answer"), gone)

    def _at(self, what: str, *, waits: bool) -> None:
        """Nothing: the place of this rank is that of its main thread."""

    def _tell(self, wait: Wait | None) -> None:
        """Nothing: waits of this rank are those of its main thread."""
