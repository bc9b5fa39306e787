"""The order in which a rank has begun its collectives, so that ranks which have drifted apart can tell, and say where.

Each collective has a number and a hash of itself and of all before it. Messages are tagged with that hash: those of
ranks that do not do the same never meet, whatever their sizes. A rank that waits for long puts the last lines of its
journal where the others read them; where two have another hash under one number, they have drifted apart.
"""

from __future__ import annotations

import hashlib
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakValueDictionary

NUM_KEPT = 256


class Moved(NamedTuple):
    """Identity of a collective's data: a hash that is the same on all ranks, and its name for a message."""

    mark: bytes
    what: str


class Entry(NamedTuple):
    """A collective that a rank has begun: its number, the hash of all up to it, and where that was."""

    number: int
    hash: int
    place: str


@dataclass
class Journal:
    """The collectives that one rank has begun on one lane.

    `name` is the lane's, the same on all ranks; `call` is the number of the model's call that is under way.
    """

    name: str = ""
    call: int = 0
    number: int = 0
    hash: int = 0
    lines: deque[Entry] = field(default_factory=lambda: deque(maxlen=NUM_KEPT))
    _part: int = 0

    def enter(self, kind: str, sizes: Sequence[int], moved: Moved | None) -> int:
        """Note a collective that begins, and give its number."""
        mark, what = moved or (b"", kind)
        self.hash = zlib.crc32(mark, zlib.crc32(f"{kind}{sizes}".encode(), self.hash))
        self.number += 1
        self._part = 0
        self.lines.append(Entry(self.number, self.hash, f"{what} in call {self.call}"))
        return self.number

    def last_lines(self) -> list[Entry]:
        """The lines that are kept, in order. A thread may ask while another begins collectives."""
        while True:
            try:
                return list(self.lines)
            except RuntimeError:  # a line came meanwhile
                continue

    def tag(self) -> int:
        """A number for the messages of the next part of the collective that began last."""
        self._part += 1
        return zlib.crc32(self._part.to_bytes(4, "little"), self.hash)


_journals: WeakValueDictionary[str, Journal] = WeakValueDictionary()


def keep(journal: Journal) -> None:
    """Let `begun` count a journal for as long as somebody holds it."""
    _journals[journal.name] = journal


def ranks_word(ranks: Sequence[int]) -> str:
    """A word for these ranks in their order, to name things after, whose length does not grow with their number.

    >>> ranks_word((0, 2, 5))
    '0_2_5'
    >>> ranks_word(range(1024))
    '1024-69c46eb0c08c2ef0'
    """
    word = "_".join(map(str, ranks))
    return word if len(ranks) <= 8 else f"{len(ranks)}-{hashlib.blake2b(word.encode(), digest_size=8).hexdigest()}"


_shared: dict[tuple[int, ...], Journal] = {}


def journal_of(ranks: tuple[int, ...]) -> Journal:
    """The journal of all that these ranks do together: on GPUs all their models use the same communicators."""
    if ranks not in _shared:
        _shared[ranks] = Journal(f"zgraph/group/{ranks_word(ranks)}")
        keep(_shared[ranks])
    return _shared[ranks]


def begun() -> dict[str, int]:
    """How many collectives this process has begun on each of its lanes."""
    journals = [journal for ref in _journals.valuerefs() if (journal := ref()) is not None]
    return {journal.name: journal.number for journal in journals}


def print_lines(lines: Sequence[Entry]) -> str:
    """Lines of a journal as text."""
    return "\n".join(f"{line.number} {line.hash} {line.place}" for line in lines)


def parse_lines(text: str) -> list[Entry]:
    """The lines that `print_lines` wrote; those that are none are left out."""
    split = (line.split(" ", 2) for line in text.splitlines())
    entries = (parts for parts in split if len(parts) == 3 and all(part.isdecimal() for part in parts[:2]))
    return [Entry(int(number), int(found), place) for number, found, place in entries]


def first_difference(ours: Sequence[Entry], theirs: Sequence[Entry]) -> tuple[Entry, Entry] | None:
    """The first number under which two ranks began another collective; None as far as they did the same.

    >>> first_difference([Entry(1, 7, "a"), Entry(2, 8, "b")], [Entry(1, 7, "a"), Entry(2, 9, "c")])
    (Entry(number=2, hash=8, place='b'), Entry(number=2, hash=9, place='c'))
    """
    known = {line.number: line for line in ours}
    pairs = ((known[line.number], line) for line in theirs if line.number in known)
    return next(((a, b) for a, b in pairs if a.hash != b.hash), None)
