"""Watch over a rank whose waits are its GPU's: the processor runs ahead, and cannot see that a collective never ends.

The heartbeat looks. Where another rank failed, ended, or runs another program, it aborts the communicators, so that
the device and the main thread come free; the main thread then raises the reason wherever it meets its peers next.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from zgraph.errors import PeerError, PlanMismatchError, ZgraphError
from zgraph.runtime.alarms import Alarm, raise_alarm
from zgraph.runtime.beats import Place, beat_key
from zgraph.runtime.circle import AGAIN, Circle, rank_names
from zgraph.runtime.drift import Wait
from zgraph.runtime.elsewhere import Seen
from zgraph.runtime.journal import Journal, Moved
from zgraph.runtime.store_errors import STORE_IS_GONE

STUCK_SECONDS = 3.0
"""A device that has not come to the end of what was queued for so long is taken to wait."""
PATIENCE_SECONDS = 4.0
"""For how much longer a rank that its neighbour calls silent is listened to: it may only be busy."""
GRACE_SECONDS = 2.0
"""How long a rank may take to fail in the same call as another: then all have failed alike, and may go on."""


@dataclass(frozen=True)
class Mark:
    """A point in the work of a device.

    Args:
        number: how many collectives had begun before it.
        since: when it was made.
        is_passed: whether the device has come there.
    """

    number: int
    since: float
    is_passed: Callable[[], bool]


class Marks(Protocol):
    """Makes marks."""

    def enter(self) -> None:
        """A collective begins: called by the main thread, or by autograd's."""

    def __call__(self, number: int) -> Mark | None: ...


class DeviceMarks:
    """Marks at the end of what is queued on the stream that computes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: torch.cuda.Stream | None = None

    def enter(self) -> None:
        """A collective begins, for the stream that is current: torch's, as the user may have set it."""
        self.stream = torch.cuda.current_stream(self.device)

    def __call__(self, number: int) -> Mark | None:
        if self.stream is None:
            return None
        try:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self.stream)
        except RuntimeError:  # the device failed: the main thread meets that itself
            return None
        return Mark(number, time.monotonic(), partial(_is_over, event))


def _is_over(event: torch.cuda.Event) -> bool:
    try:
        return bool(event.query())  # type: ignore[no-untyped-call]
    except RuntimeError:
        return True


class HostMarks:
    """Marks where the main thread waits: for a device whose collectives the processor itself waits for."""

    def __init__(self, peers: Circle) -> None:
        self.peers = peers

    def enter(self) -> None: ...

    def __call__(self, number: int) -> Mark | None:
        place = self.peers.place
        if not place.waits:
            return None
        return Mark(number, place.since, lambda: self.peers.place is not place)


class Watch:
    """Looks at each beat whether the ranks of a model can go on.

    Args:
        peers: they.
        journal: the collectives that this rank has begun.
        marks: make marks in the work of the device.
        abort: ends collectives that are under way with this rank; it may take long.
    """

    def __init__(self, peers: Circle, journal: Journal, marks: Marks, abort: Callable[[int], None]) -> None:
        self.peers, self.journal, self.marks, self.abort = peers, journal, marks, abort
        ranks = peers.ranks
        self.next = ranks[(ranks.index(peers.rank) + 1) % len(ranks)]
        self._pending: list[tuple[Alarm, float]] = []
        self._mark: Mark | None = None
        self._marked: tuple[int, Place] = 0, peers.place
        self._wait: Wait | None = None
        self._seen: Seen = {}

    @property
    def reason(self) -> str:
        """Why the ranks cannot go on; empty while they can."""
        return str(self.peers.doom or "")

    @property
    def stuck_at(self) -> Place | None:
        """Where the device waits, if it does for long."""
        if self._wait is None or self._mark is None:
            return None
        what = self._what(self._mark.number).rpartition(" in call ")[0]
        return Place(self.peers.call, what, True, self._mark.since)

    @property
    def wait(self) -> Wait | None:
        """The same wait, as other ranks are told of it."""
        return self._wait

    def enter(self, kind: str, moved: Moved) -> None:
        """Note a collective that begins."""
        self.marks.enter()
        self.journal.enter(kind, (), moved)

    def look(self, alarms: Sequence[Alarm]) -> None:
        """Take new alarms, and look whether the device goes on. Raises RuntimeError if the store is gone."""
        if self.peers.doom is not None:
            return
        now = time.monotonic()
        self._pending += [(alarm, now) for alarm in alarms if alarm.kind == "over" or alarm.rank != self.peers.rank]
        for alarm, since in self._pending:
            if (error := self._ends(alarm, now - since)) is not None:
                self.doom(error, alarm.rank)
                return
        self._pending = [(a, since) for a, since in self._pending if not self._is_past(a)]
        self._look_at_device(now)

    def look_alone(self) -> None:
        """Look whether the device goes on, though the store is gone."""
        if self.peers.doom is not None:
            return
        for alarm, _ in self._pending:
            if (error := self._ends(alarm, math.inf)) is not None:
                self.doom(error, alarm.rank)
                return
        mark = self._mark
        if mark is None or mark.is_passed():
            self._mark = self._new_mark()
        elif time.monotonic() - mark.since > STUCK_SECONDS:
            place = self._what(mark.number)
            self.doom(PeerError(f"{STORE_IS_GONE}, while rank {self.peers.rank} waits for {place}. {AGAIN}"), self.next)

    def doom(self, error: ZgraphError, rank: int) -> None:
        """Have the main thread raise this, and end what it waits for.

        Args:
            error: the reason.
            rank: whose communicators are aborted.
        """
        self.peers.doom = error
        self._wait, self._mark = None, None
        threading.Thread(target=self.abort, args=(rank,), name="zgraph-abort", daemon=True).start()

    # --- alarms ------------------------------------------------------------------------------------------------------

    def _ends(self, alarm: Alarm, seconds: float) -> ZgraphError | None:
        """The error, if after this alarm the model's ranks cannot go on."""
        peers = self.peers
        if alarm.kind == "over":
            kind = PlanMismatchError if alarm.text.startswith(PlanMismatchError.__name__) else PeerError
            return kind(alarm.text.partition(": ")[2]) if alarm.scope == peers.group_name else None
        if alarm.rank not in peers.ranks:
            return None
        begun, is_ahead = alarm.begun.get(self.journal.name, 0), self.journal.number
        if alarm.kind == "left" and is_ahead > begun:
            place = self._what(begun + 1)
            return PeerError(f"rank {alarm.rank} {alarm.text}, while rank {peers.rank} waits for {place}. {AGAIN}")
        if alarm.kind == "failed" and seconds > GRACE_SECONDS and not self._is_past(alarm):
            name, _, call = alarm.scope.rpartition("/")
            if name == peers.name and (is_ahead > begun or peers.call > int(call)):
                return PeerError(f"another rank failed: {alarm.text}")
        return None

    def _is_past(self, alarm: Alarm) -> bool:
        """Whether this rank failed in the same call, or in a later one."""
        name, _, call = alarm.scope.rpartition("/")
        return alarm.kind == "failed" and (name != self.peers.name or self.peers.failed_call >= int(call))

    def _what(self, number: int) -> str:
        """The collective of this number, for a message."""
        lines = self.journal.last_lines()
        return next((line.place for line in lines if line.number >= number), f"call {self.peers.call}")

    # --- a device that does not go on --------------------------------------------------------------------------------

    def _look_at_device(self, now: float) -> None:
        mark = self._mark
        if mark is None or mark.is_passed():
            self._end_wait()
            self._mark = self._new_mark()
        elif now - mark.since > STUCK_SECONDS:
            if error := self._look_around(mark, now):
                word = f"{type(error).__name__}: {error}"
                raise_alarm(self.peers.store, Alarm("over", self.peers.group_name, self.peers.rank, word))
                self.doom(error, self.next)

    def _new_mark(self) -> Mark | None:
        """A mark, if this rank has begun collectives or waited since the last: what else the device waits for, in a
        collective of the script's own say, is none of the model's.
        """
        number, place = self.journal.number, self.peers.place
        if number == self._marked[0] and (not number or not place.what or place == self._marked[1]):
            return None
        if (mark := self.marks(number)) is not None:
            self._marked = number, place
        return mark

    def _look_around(self, mark: Mark, now: float) -> ZgraphError | None:
        """Tell for what this rank waits, and look at the next rank: where two differ, so do two neighbours."""
        peers = self.peers
        if self._wait is None:
            self._wait = peers.new_wait(self._what(mark.number), mark.number)
        self._wait.looks += 1
        self._wait.tell()
        if found := peers.drifted(self._wait, self._seen):
            return PlanMismatchError(found)
        if gone := peers.silent(PATIENCE_SECONDS):
            keys = ", ".join(map(beat_key, gone))
            are, send = ("is", "it sends") if len(gone) == 1 else ("are", "they send")
            return PeerError(
                f"{rank_names(gone)} {are} gone, while rank {peers.rank} waits for {self._wait.place}: {send} no "
                f"heartbeat ({keys}). {AGAIN}"
            )
        if now - mark.since > peers.limit_s:
            return PeerError(f"rank {peers.rank} has waited for {peers.limit_s:g} s: {peers.places()}")
        return None

    def _end_wait(self) -> None:
        self._wait, self._seen = None, {}
