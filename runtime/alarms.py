"""Alarms: a rank failed, or ended. They are numbered, so that one key of the store tells whether there is another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from zgraph.bridge.private_runtime import Store

MOST_AT_ONCE = 8
"""Alarms that a reader takes at once: many ranks may end together."""
HOLE_BEATS = 8
"""How often a reader that finds nothing asks whether a number was taken and stayed empty."""
_COUNT = "zgraph/alarms"


@dataclass(frozen=True)
class Alarm:
    """Word that a rank cannot go on.

    Args:
        kind: "failed" in a call of a model; "left", as its process ends; "over" where no rank can go on.
        scope: the name of the model and the number of the call that failed; of "over" the name of the group.
        rank: the rank that failed or ended.
        text: why; of "over" the whole message.
        begun: how many collectives the rank had begun on each lane.
    """

    kind: str
    scope: str
    rank: int
    text: str
    begun: Mapping[str, int] = field(default_factory=dict)


def raise_alarm(store: Store, alarm: Alarm) -> None:
    """Put an alarm behind those that are there. Raises RuntimeError if the store is gone."""
    store.set(_key(store.add(_COUNT, 1)), json.dumps(asdict(alarm)))


class Alarms:
    """Reads alarms in their order."""

    def __init__(self, store: Store) -> None:
        self.store, self.num_read = store, 0
        self._num_asked = self._num_empty = 0

    def new(self) -> list[Alarm]:
        """Alarms that have not been read: one question to the store where there are none, and now and then another."""
        found: list[Alarm] = []
        while len(found) < MOST_AT_ONCE and self.store.check([_key(self.num_read + 1)]):
            self.num_read += 1
            found.append(Alarm(**json.loads(self.store.get(_key(self.num_read)))))
        self._skip_hole(is_empty=not found)
        return found

    def _skip_hole(self, *, is_empty: bool) -> None:
        """Pass over a number that a process took and never filled, as it was killed: it would hide all later ones."""
        self._num_asked += 1
        if not is_empty:
            self._num_empty = 0
        elif self._num_empty or self._num_asked % HOLE_BEATS == 0:
            is_hole = self.store.add(_COUNT, 0) > self.num_read
            self._num_empty = self._num_empty + 1 if is_hole else 0
            if self._num_empty > 2:
                self.num_read, self._num_empty = self.num_read + 1, 1


def _key(number: int) -> str:
    return f"zgraph/alarm/{number}"
