"""Ranks that have drifted apart: one skipped a backward, say. Those that wait find out from their neighbours.

With each heartbeat, a rank that has waited for a while says for what. It looks at the next rank of the ring only: where
two ranks differ, so do two neighbours. Nothing of this happens in a step that goes well.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

from zgraph.bridge.private_runtime import Store
from zgraph.runtime.beats import Beat
from zgraph.runtime.journal import Journal, begun, first_difference, parse_lines, print_lines
from zgraph.runtime.questions import is_there, peek

REMEDY = (
    "All ranks must run the same forwards and backwards in the same order: none may skip one (because its loss is not "
    "finite, say), run one more, or evaluate alone. Let all decide alike, then start the job again from its last "
    "checkpoint."
)
_serials = itertools.count(1)


@dataclass
class Wait:
    """A wait of this rank that has become long.

    Args:
        store: where the ranks tell one another.
        rank: this one.
        place: what it waits for, for a message.
        journal: of the lane; None where there is none.
        number: of the collective in the journal; 0 where it is a comparison.
        comparison: key of its ruling in the store; nothing where it is a collective.
        scope: the call of the model that it is in.
        looks: how often whoever waits has found that it still does.
    """

    store: Store
    rank: int
    place: str
    journal: Journal | None
    number: int = 0
    comparison: str = ""
    scope: str = ""
    looks: int = 0
    _serial: int = field(default_factory=lambda: next(_serials))
    _told: int = -1
    _seen: dict[int, tuple[int, int]] = field(default_factory=dict)

    def word(self) -> dict[str, Any]:
        """Description of the wait that goes with each heartbeat."""
        last = self.journal.last_lines()[-1:] if self.journal else []
        return {
            "serial": self._serial,
            "looks": self.looks,
            "place": self.place,
            "number": self.number,
            "comparison": self.comparison,
            "scope": self.scope,
            "journal": self.journal.name if self.journal else "",
            "last": [last[0].number, last[0].hash] if last else [],
            "begun": begun(),
        }

    def tell(self) -> None:
        """Put the end of the journal where the others read it, if it has grown since. Raises RuntimeError if the store
        is gone.
        """
        if self.journal is not None and self._told != self.journal.number:
            self._told = self.journal.number
            self.store.set(_key(self.rank), print_lines(self.journal.last_lines()))

    def drifted(self, rank: int, beat: Beat) -> str:
        """Describes where another rank's work does not match this one's; empty if it does, as far as is known.

        Args:
            rank: the other.
            beat: its last heartbeat.
        """
        return self.differs(rank, beat) or self._apart(rank, beat)

    def differs(self, rank: int, beat: Beat) -> str:
        """Describes the first collective that another rank which waits began in the place of this one's.

        Its journal is read only where the hashes of the two differ.
        """
        word, journal = beat.wait, self.journal
        if not word or not journal or not journal.name or word["journal"] != journal.name or not word["last"]:
            return ""
        number, hash_there = word["last"]
        ours = journal.last_lines()
        if all(line.number != number or line.hash == hash_there for line in ours):
            return ""
        pair = first_difference(ours, parse_lines(peek(self.store, _key(rank)).decode(errors="replace")))
        return self._message(pair[0].place, rank, pair[1].place) if pair is not None else ""

    def still_waits(self, rank: int, beat: Beat) -> bool:
        """Whether another rank goes on to wait for the same since this one first saw it: a heartbeat may be old."""
        word = beat.wait
        if not word:
            return False
        serial, looks = self._seen.setdefault(rank, (word["serial"], word["looks"]))
        if word["serial"] != serial:
            self._seen[rank] = word["serial"], word["looks"]
            return False
        return bool(word["looks"] > looks)

    def _apart(self, rank: int, beat: Beat) -> str:
        """Describes two ranks of which each waits for what the other has not begun."""
        word = beat.wait
        if not self.still_waits(rank, beat) or not self._blocks(word) or not self._is_blocked_by(word):
            return ""
        if bool(word["comparison"]) != bool(self.comparison) and word["scope"] == self.scope:
            return ""  # the one that compares says what it has compiled
        if any(key and is_there(self.store, key) for key in (self.comparison, word["comparison"])):
            return ""  # it is over, and a rank has yet to hear of it
        return self._message(self.place, rank, word["place"])

    def _blocks(self, word: dict[str, Any]) -> bool:
        """Whether another rank waits for what this one has not begun."""
        if word["comparison"]:
            return bool(word["comparison"] != self.comparison)
        return word["journal"] in (known := begun()) and known[word["journal"]] < word["number"]

    def _is_blocked_by(self, word: dict[str, Any]) -> bool:
        """Whether this rank waits for what another, which waits itself, has not begun."""
        if self.comparison:
            return bool(word["comparison"] != self.comparison)
        return self.journal is not None and word["begun"].get(self.journal.name, self.number) < self.number

    def _message(self, here: str, rank: int, there: str) -> str:
        pair = sorted([(self.rank, here), (rank, there)])
        places = ", ".join(f"rank {r} is at {place}" for r, place in pair)
        return f"the ranks have drifted apart: {places}. {REMEDY}"


def _key(rank: int) -> str:
    return f"zgraph/waits/{rank}"
