"""That a rank lives, and where it is: a number in the store that grows."""

from __future__ import annotations

import atexit
import itertools
import logging
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple, Protocol

from zgraph.bridge.private_runtime import Store
from zgraph.runtime.alarms import Alarm, Alarms
from zgraph.runtime.departures import watch
from zgraph.runtime.elsewhere import Lookout

BEAT_SECONDS = 0.5
log = logging.getLogger("zgraph")


class Place(NamedTuple):
    """Where a rank is: in which call of a model, and what it waits for there, or has waited for last."""

    call: int
    what: str
    waits: bool
    since: float

    def __str__(self) -> str:
        if self.waits:
            return f"waits for {self.what} in call {self.call}"
        after = f", after {self.what}" if self.what else ""
        return f"has not answered for {time.monotonic() - self.since:.0f} s, last seen in call {self.call}{after}"


def beat_key(rank: int) -> str:
    """Where a rank's heartbeat is in the store."""
    return f"zgraph/beat/{rank}"


class Watcher(Protocol):
    """Looks at each beat whether the ranks of a model can go on."""

    @property
    def stuck_at(self) -> Place | None:
        """Where the device waits, if it does for long."""

    @property
    def reason(self) -> str:
        """Why the ranks cannot go on; empty while they can."""

    def look(self, alarms: list[Alarm]) -> None:
        """Read new alarms, and look whether the device goes on."""

    def look_alone(self) -> None:
        """Look whether the device goes on, though the store is gone."""


class Heartbeat(threading.Thread):
    """Writes a growing number to the store, so that others can tell a busy rank from one that is gone.

    With it goes the place where the rank is. At each beat those who watch over a device look on.
    """

    def __init__(self, store: Store, rank: int) -> None:
        super().__init__(name="zgraph-heartbeat", daemon=True)
        self.store, self.rank = store, rank
        self.over = threading.Event()
        self.place = Place(0, "", False, time.monotonic())
        self._has_told = False
        self._watchers: tuple[weakref.ref[Watcher], ...] = ()
        self.start()
        atexit.register(self.stop)

    def run(self) -> None:
        lookout, alarms = Lookout(self.store, self.rank), Alarms(self.store)
        for count in itertools.count():
            if not self._beat(count, lookout, alarms) or self.over.wait(BEAT_SECONDS):
                return

    def _beat(self, count: int, lookout: Lookout, alarms: Alarms) -> bool:
        """One beat; False if none need follow. Nobody is held from one to the next.

        What goes wrong while looking does not end the heart: only where the beat itself cannot be written is the store
        taken to be gone.
        """
        watchers = self.watchers()
        new: list[Alarm] = []
        looks: list[Callable[[], None]] = [partial(lookout.look, count)]
        if watchers:
            looks += [lambda: new.extend(alarms.new()), *(partial(watcher.look, new) for watcher in watchers)]
        problem = ""
        for look in looks:
            try:
                look()
            except Exception:
                problem = problem or traceback.format_exc()
        place = next((p for watcher in watchers if (p := watcher.stuck_at) is not None), self.place)
        try:
            self.store.set(beat_key(self.rank), f"{count} {place}")
        except (RuntimeError, ValueError):  # the store closed with the job
            for watcher in watchers:
                watcher.look_alone()
            return bool(watchers)
        if problem and not self._has_told:
            self._has_told = True
            log.warning("the heartbeat of rank %d goes on, but could not look on once: %s", self.rank, problem)
        return True

    def add(self, watcher: Watcher) -> None:
        """Have someone look on from now on, for as long as others hold it."""
        self._watchers = (*(ref for ref in self._watchers if ref() is not None), weakref.ref(watcher))

    def watchers(self) -> list[Watcher]:
        """Who looks on."""
        return [watcher for ref in self._watchers if (watcher := ref()) is not None]

    def reason(self) -> str:
        """Why this rank cannot go on, if those who watch know; else empty."""
        return next((watcher.reason for watcher in self.watchers() if watcher.reason), "")

    def stop(self) -> None:
        """End before the interpreter does: a thread cut off inside the store's C++ code would abort the process."""
        self.over.set()
        self.join(5 * BEAT_SECONDS)


@lru_cache(maxsize=1)
def heartbeat(store: Store, rank: int) -> Heartbeat:
    """This process's; begun if it is not."""
    made = Heartbeat(store, rank)
    watch(store, rank, made.reason)
    return made
