"""Ranks that have drifted apart: one skipped a backward, say. Those that wait find out from one another's journals.

A rank that has waited for a while says in the store for what, again and again, and reads what the others say. Nothing
of this happens in a step that goes well.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from zgraph.bridge.private_runtime import Store
from zgraph.runtime.departures import departures
from zgraph.runtime.elsewhere import Seen
from zgraph.runtime.journal import Journal, begun, first_difference, parse_lines, print_lines

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
        ranks: all that take part.
        place: what it waits for, for a message.
        journal: of the lane; None where there is none.
        number: of the collective in the journal; 0 where it is a comparison.
        comparison: which; nothing where it is a collective.
        outside: the ranks that were found to wait outside of the model.
    """

    store: Store
    rank: int
    ranks: Sequence[int]
    place: str
    journal: Journal | None
    number: int = 0
    comparison: str = ""
    outside: Seen = field(default_factory=dict)
    _serial: int = field(default_factory=lambda: next(_serials))
    _beat: int = 0
    _seen: dict[int, tuple[int, int]] = field(default_factory=dict)

    def tell(self) -> None:
        """Say that this rank still waits, and for what."""
        self._beat += 1
        journal = self.journal
        word = {
            "serial": self._serial,
            "beat": self._beat,
            "place": self.place,
            "number": self.number,
            "comparison": self.comparison,
            "journal": journal.name if journal else "",
            "begun": begun(),
            "lines": print_lines(journal.last_lines()) if journal else "",
        }
        self.store.set(_key(self.rank), json.dumps(word))

    def drifted(self) -> str:
        """Describes another rank whose work does not match this one's; empty if none is known."""
        for rank in self.ranks:
            if rank != self.rank and self.store.check([_key(rank)]):
                word = json.loads(self.store.get(_key(rank)))
                if found := self._apart(rank, word):
                    return found
        return ""

    def left(self) -> str:
        """Which rank has ended and cannot come any more, and how; nothing if none has."""
        for rank, how, begun_there in departures(self.store, [r for r in self.ranks if r != self.rank]):
            if self.comparison or (self.journal and begun_there.get(self.journal.name, 0) < self.number):
                return f"rank {rank} {how}, while rank {self.rank} waits for {self.place}"
        return ""

    def differs(self, rank: int) -> str:
        """Describes the first collective that another rank which waits began in the place of this one's."""
        return self._differs(rank, json.loads(self.store.get(_key(rank)))) if self.store.check([_key(rank)]) else ""

    def _differs(self, rank: int, word: dict[str, Any]) -> str:
        journal = self.journal
        if journal and journal.name and word["journal"] == journal.name:
            pair = first_difference(journal.last_lines(), parse_lines(word["lines"]))
            if pair is not None:
                return self._message(pair[0].place, rank, pair[1].place)
        return ""

    def _apart(self, rank: int, word: dict[str, Any]) -> str:
        if found := self._differs(rank, word):
            return found
        still = self._seen.setdefault(rank, (word["serial"], word["beat"]))
        if word["serial"] != still[0]:
            self._seen[rank] = word["serial"], word["beat"]
        elif word["beat"] > still[1] and self._blocks(word) and self._is_blocked_by(word):
            return self._message(self.place, rank, word["place"])
        return ""

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
