"""Alarms: a rank failed, ended or is silent. They are numbered, so that one number tells whether there are others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from zgraph.bridge.private_runtime import Store
from zgraph.runtime.questions import read_all

MOST_AT_ONCE = 64
"""Alarms that a reader takes at once: many ranks may end together."""
HOLE_LOOKS = 3
"""After how many looks a number that was taken and stayed empty is passed over."""
COUNT = "zgraph/alarms"
"""Key of the number of alarms."""


@dataclass(frozen=True)
class Alarm:
    """Word that a rank cannot go on.

    Args:
        kind: "failed" in a call of a model; "left", as its process ends; "silent", as its neighbour says, who hears no
            heartbeat; "over" where no rank can go on.
        scope: the name of the model and the number of the call that failed; of "over" the name of the group.
        rank: the rank that failed or ended, or that is silent.
        text: why; of "over" the whole message; of "silent" the last beat of each rank that is, as JSON.
        begun: how many collectives the rank had begun on each lane.
    """

    kind: str
    scope: str
    rank: int
    text: str
    begun: Mapping[str, int] = field(default_factory=dict)

    @staticmethod
    def parse(word: bytes) -> Alarm | None:
        """The alarm that a rank has raised; None of a word that is no alarm, which nobody can act upon.

        What another version of zgraph says beside is left out.
        """
        try:
            found = json.loads(word)
        except (ValueError, RecursionError):
            return None
        if not isinstance(found, dict) or any(type(found.get(name)) is not kind for name, kind in _KINDS.items()):
            return None
        if any(type(number) is not int for number in found["begun"].values()):
            return None
        return Alarm(**{name: found[name] for name in _KINDS})

    @property
    def lasts(self) -> dict[int, int]:
        """The last beat of each rank that an alarm says to be silent; of those that it can be read of."""
        try:
            found = json.loads(self.text)
        except (ValueError, RecursionError):
            return {}
        pairs = found.items() if isinstance(found, dict) else ()
        return {int(rank): count for rank, count in pairs if rank.isdecimal() and type(count) is int}

    @property
    def failed_call(self) -> tuple[str, int]:
        """The name of the model and the number of the call that failed; -1 where the alarm says none."""
        name, _, call = self.scope.rpartition("/")
        return name, int(call) if call.isdecimal() else -1


_KINDS: dict[str, type] = {"kind": str, "scope": str, "rank": int, "text": str, "begun": dict}


def raise_alarm(store: Store, alarm: Alarm) -> None:
    """Put an alarm behind those that are there. Raises RuntimeError if the store is gone."""
    store.set(_key(store.add(COUNT, 1)), json.dumps(asdict(alarm)))


class Alarms:
    """Reads alarms in their order."""

    def __init__(self, store: Store) -> None:
        self.store, self.num_read = store, 0
        self._num_empty = 0

    def new(self, count: int | None = None) -> list[Alarm]:
        """Alarms that have not been read.

        Args:
            count: how many there are, for whoever has asked already: without new ones, the store is asked nothing.
        """
        count = self.store.add(COUNT, 0) if count is None else count
        numbers = range(self.num_read + 1, min(count, self.num_read + MOST_AT_ONCE) + 1)
        found: list[Alarm] = []
        for number, word in zip(numbers, read_all(self.store, [_key(n) for n in numbers]), strict=True):
            if not word and not self._is_hole():
                break
            self.num_read, self._num_empty = number, 0
            if word:
                found += [alarm] if (alarm := Alarm.parse(word)) is not None else []
        return found

    def _is_hole(self) -> bool:
        """Whether a process took the next number and was killed before it filled it: it would hide all later ones."""
        self._num_empty += 1
        return self._num_empty > HOLE_LOOKS


def _key(number: int) -> str:
    return f"zgraph/alarm/{number}"
