"""That a rank lives, and where it is: a number in the store that grows.

The ranks of a model form a ring, in which each listens to the next: two questions a beat, whatever their number. Who
hears nothing any more raises an alarm, and of alarms everybody reads the count.
"""

from __future__ import annotations

import atexit
import itertools
import json
import logging
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple, Protocol

from zgraph.bridge.private_runtime import Store
from zgraph.runtime.alarms import COUNT, Alarm, Alarms, raise_alarm
from zgraph.runtime.beats import Beat, Place, beat_key
from zgraph.runtime.departures import watch
from zgraph.runtime.drift import Wait
from zgraph.runtime.elsewhere import Lookout
from zgraph.runtime.pace import Pace
from zgraph.runtime.questions import Ears, read_all

BEAT_SECONDS = 1.25
GONE_AFTER_SECONDS = 3.5
"""A neighbour that has not been heard for so long, which is three beats, is said to be silent. Nobody is blamed yet:
whoever waits for it listens once more, a beat later.
"""
log = logging.getLogger("zgraph")


class Watcher(Protocol):
    """Looks at each beat whether the ranks of a model can go on."""

    @property
    def stuck_at(self) -> Place | None:
        """Where the device waits, if it does for long."""

    @property
    def wait(self) -> Wait | None:
        """The same wait, as other ranks are told of it."""

    @property
    def reason(self) -> str:
        """Why the ranks cannot go on; empty while they can."""

    def look(self, alarms: Sequence[Alarm]) -> None:
        """Take new alarms, and look whether the device goes on."""

    def look_alone(self) -> None:
        """Look whether the device goes on, though the store is gone."""


class Member(Protocol):
    """Whoever needs to know whether ranks live: they form a ring, in which this one has the place `at`."""

    ranks: tuple[int, ...]
    at: int


class Heard(NamedTuple):
    """The last heartbeat of another rank, and when it was new."""

    word: bytes
    since: float


class Heartbeat(threading.Thread):
    """Writes a growing number to the store, so that others can tell a busy rank from one that is gone.

    With it goes the place where the rank is. At each beat those who watch over a device look on.

    Args:
        store: of the job.
        rank: this one.

    `alarms` are all that have come so far; `wait` is the wait of the main thread, once it is long; `pace` is told of
    calls and waits; `slowness` says how
    many times longer the last beats took than they should: on a busy machine, others are late too.
    """

    def __init__(self, store: Store, rank: int) -> None:
        super().__init__(name="zgraph-heartbeat", daemon=True)
        self.store, self.rank = store, rank
        self.ears = Ears(store)
        self.over = threading.Event()
        self.place = Place(0, "", False, time.monotonic())
        self.wait: Wait | None = None
        self.pace = Pace()
        self.alarms: list[Alarm] = []
        self.heard: dict[int, Heard] = {}
        self._log = Alarms(store)
        self._is_counted = False
        self._here: set[int] = set()
        self.slowness = 1.0
        self._times: deque[float] = deque(maxlen=5)
        self._lock = threading.Lock()
        self._told: dict[int, bytes] = {}
        self._has_told = False
        self._num_shown = 0
        self._members: tuple[weakref.ref[Member], ...] = ()
        self._watchers: tuple[weakref.ref[Watcher], ...] = ()
        self._lookout = Lookout()
        self.start()
        atexit.register(self.stop)

    def run(self) -> None:
        for count in itertools.count(1):
            if not self._beat(count) or self.over.wait(BEAT_SECONDS):
                return

    def _beat(self, count: int) -> bool:
        """One beat; False if none need follow. Nobody is held from one to the next.

        What goes wrong while looking does not end the heart: only where the store does not answer is it taken to be
        gone.
        """
        watchers, said = self.watchers(), [Beat(count)]
        problem = _tried(lambda: said.append(self._word(count, watchers)))
        try:
            self.store.set(beat_key(self.rank), str(said[-1]))
            self.listen()
        except (RuntimeError, ValueError):  # the store closed with the job
            for watcher in watchers:
                watcher.look_alone()
            return bool(watchers)
        new = self.alarms[self._num_shown :]
        for watcher in watchers:
            problem = _tried(partial(watcher.look, new)) or problem
        self._num_shown += len(new) if watchers else 0
        if problem and not self._has_told:
            self._has_told = True
            log.warning("the heartbeat of rank %d goes on, but could not look on once: %s", self.rank, problem)
        return True

    def _word(self, count: int, watchers: Sequence[Watcher]) -> Beat:
        """Where this rank is, and what it waits for: its device, if it does, else the main thread."""
        place = next((p for watcher in watchers if (p := watcher.stuck_at) is not None), self.place)
        wait = next((w for watcher in watchers if (w := watcher.wait) is not None), self.wait)
        said = wait.word() if wait is not None else {}
        return Beat(count, str(place), place.waits, self._lookout.look(), said, self.pace.word())

    # --- listening ---------------------------------------------------------------------------------------------------

    def listen(self) -> None:
        """Hear the neighbours, and read new alarms. Raises RuntimeError if the store is gone."""
        rings = [member for ref in self._members if (member := ref()) is not None]
        if not rings:
            return
        near = {rank for ring in rings if (rank := self.neighbour(ring)) is not None}
        now = time.monotonic()
        self._times.append(now)
        self.slowness = max(1.0, *((b - a) / BEAT_SECONDS for a, b in itertools.pairwise([now, *self._times])))
        if not self._is_counted:  # that the count can be read, though it is none
            self._is_counted = self.store.add(COUNT, 0) >= 0
        for rank in near - self.heard.keys():
            self.store.compare_set(beat_key(rank), "", "")  # that it can be read, though it has not come yet
        count, *words = self.store.multi_get([COUNT, *map(beat_key, sorted(near))])
        self._hear(sorted(near), words, now)
        late = {rank for rank in near if self._silence_s(rank, now) > 1.9 * BEAT_SECONDS * self.slowness}
        far = {rank for ring in rings if late & {*ring.ranks} for rank in ring.ranks} if late else set()
        far -= {self.rank, *near}
        if far:  # a whole host may be gone: nobody but its neighbour looks at so many
            self._hear(sorted(far), self._far_words(sorted(far)), now)
        self.heard = {rank: heard for rank, heard in self.heard.items() if rank in far or rank in near}
        if any(self._silence_s(rank, now) > GONE_AFTER_SECONDS * self.slowness for rank in late):
            self._say_silent([rank for rank in self.heard if self._silence_s(rank, now) > 0.9 * BEAT_SECONDS])
        self.read_alarms(int(count) if bytes(count).isdigit() else len(self.alarms))

    def _far_words(self, ranks: Sequence[int]) -> list[bytes]:
        """Heartbeats of many ranks: one question, once it is known that all of them have come."""
        keys = [beat_key(rank) for rank in ranks]
        if self._here >= {*ranks}:
            return [bytes(word) for word in self.store.multi_get(keys)]
        words = read_all(self.store, keys)
        self._here |= {rank for rank, word in zip(ranks, words, strict=True) if word}
        return words

    def _hear(self, ranks: Sequence[int], words: Sequence[bytes], now: float) -> None:
        for rank, word in zip(ranks, words, strict=True):
            if rank not in self.heard or word != self.heard[rank].word:
                self.heard[rank] = Heard(bytes(word), now)

    def _silence_s(self, rank: int, now: float) -> float:
        """For how long a rank that has been heard was not heard again."""
        return now - self.heard[rank].since if self.heard[rank].word else 0.0

    def _say_silent(self, ranks: Sequence[int]) -> None:
        """Raise an alarm for ranks that are silent, once for each of their silences."""
        gone = self.departed()
        words = {rank: self.heard[rank].word for rank in sorted(ranks) if rank not in gone}
        if words.items() - self._told.items():
            self._told = words
            lasts = {rank: beat.count for rank, word in words.items() if (beat := Beat.read(word)) is not None}
            raise_alarm(self.store, Alarm("silent", "", min(words), json.dumps(lasts)))

    def read_alarms(self, count: int | None = None) -> None:
        """Read new alarms, of which there are `count`; by default the store is asked. RuntimeError if it is gone."""
        with self._lock:
            self.alarms += self._log.new(count)

    def departed(self) -> dict[int, Alarm]:
        """The ranks that have left word of their end."""
        return {alarm.rank: alarm for alarm in list(self.alarms) if alarm.kind == "left"}

    def neighbour(self, ring: Member) -> int | None:
        """The next rank of a ring that has not ended; None if there is no other."""
        gone = self.departed()
        behind = itertools.chain(range(ring.at + 1, len(ring.ranks)), range(ring.at))
        return next((ring.ranks[i] for i in behind if ring.ranks[i] not in gone), None)

    def beat_of(self, rank: int) -> Beat | None:
        """The last heartbeat of a neighbour; None if it was never heard."""
        heard = self.heard.get(rank)
        return Beat.read(heard.word) if heard is not None else None

    # --- watchers ----------------------------------------------------------------------------------------------------

    def add_member(self, member: Member) -> None:
        """Listen to a ring of ranks, for as long as others hold it."""
        self._members = (*(ref for ref in self._members if ref() is not None), weakref.ref(member))

    def add(self, watcher: Watcher) -> None:
        """Have someone look on from now on, for as long as others hold it."""
        self._watchers = (*(ref for ref in self._watchers if ref() is not None), weakref.ref(watcher))

    def watchers(self) -> list[Watcher]:
        """Those who look on."""
        return [watcher for ref in self._watchers if (watcher := ref()) is not None]

    def reason(self) -> str:
        """Why this rank cannot go on, if those who watch know; else empty."""
        return next((watcher.reason for watcher in self.watchers() if watcher.reason), "")

    def stop(self) -> None:
        """End before the interpreter does: a thread cut off inside the store's C++ code would abort the process."""
        self.over.set()
        self.join(5 * BEAT_SECONDS)


def _tried(look: Callable[[], None]) -> str:
    """The error that a look ended with, for a message; empty if it ended well."""
    try:
        look()
    except Exception:
        return traceback.format_exc()
    return ""


@lru_cache(maxsize=1)
def heartbeat(store: Store, rank: int) -> Heartbeat:
    """This process's; begun if it is not."""
    made = Heartbeat(store, rank)
    watch(store, rank, made.reason)
    return made
