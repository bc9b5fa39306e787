"""That a rank lives, and where it is: a number in the store that grows."""

from __future__ import annotations

import atexit
import itertools
import threading
import time
from functools import lru_cache
from typing import NamedTuple

from zgraph.bridge.private_runtime import Store
from zgraph.runtime.departures import watch
from zgraph.runtime.elsewhere import Lookout

BEAT_SECONDS = 0.5


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


class Heartbeat(threading.Thread):
    """Writes a growing number to the store, so that others can tell a busy rank from one that is gone.

    With it goes the place where the rank is.
    """

    def __init__(self, store: Store, rank: int) -> None:
        super().__init__(name="zgraph-heartbeat", daemon=True)
        self.store, self.rank = store, rank
        self.over = threading.Event()
        self.place = Place(0, "", False, time.monotonic())
        self.start()
        atexit.register(self.stop)

    def run(self) -> None:
        lookout = Lookout(self.store, self.rank)
        for count in itertools.count():
            try:
                lookout.look(count)
                self.store.set(beat_key(self.rank), f"{count} {self.place}")
            except (RuntimeError, ValueError):
                return  # the store closed with the job
            if self.over.wait(BEAT_SECONDS):
                return

    def stop(self) -> None:
        """End before the interpreter does: a thread cut off inside the store's C++ code would abort the process."""
        self.over.set()
        self.join(5 * BEAT_SECONDS)


@lru_cache(maxsize=1)
def heartbeat(store: Store, rank: int) -> Heartbeat:
    """This process's; begun if it is not."""
    made = Heartbeat(store, rank)
    watch(store, rank)
    return made
