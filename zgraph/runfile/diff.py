"""Differences between two graphs, line by line of their texts.

A node in both graphs has moved if it is not on a longest run that has the same order in both (Hunt, Szymanski: "A fast
algorithm for computing longest common subsequences", 1977).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from zgraph.ir.lines import Line, node_lines, read_line


@dataclass(frozen=True)
class Difference:
    """From one graph to another.

    Args:
        added: nodes that are only in the second.
        removed: nodes that are only in the first.
        changed: nodes that are another text than before, each behind what it was.
        moved: nodes that are elsewhere among those that stayed.
    """

    added: tuple[Line, ...]
    removed: tuple[Line, ...]
    changed: tuple[tuple[Line, Line], ...]
    moved: tuple[Line, ...]

    @property
    def stat(self) -> dict[str, dict[str, int]]:
        """How many nodes of each op were added, removed, changed and moved."""
        kinds = {
            "added": self.added,
            "removed": self.removed,
            "changed": [new for _, new in self.changed],
            "moved": self.moved,
        }
        return {kind: dict(Counter(line.op for line in lines).most_common()) for kind, lines in kinds.items()}


def compare(before: str, after: str) -> Difference:
    """Compare the texts of two graphs."""
    old, new = node_lines(before), node_lines(after)
    pairs = ((key, old[key], line) for key, line in new.items() if old.get(key, line) != line)
    lines = ((read_line(was, key), read_line(now, key)) for key, was, now in pairs)
    return Difference(
        tuple(read_line(line, key) for key, line in new.items() if key not in old),
        tuple(read_line(line, key) for key, line in old.items() if key not in new),
        tuple((was, now) for was, now in lines if was.text != now.text),
        tuple(read_line(new[key], key) for key in moved(list(old), list(new))),
    )


def moved(before: Sequence[str], after: Sequence[str]) -> list[str]:
    """Keys in both, but not on a longest run that has the same order in both."""
    position = {key: at for at, key in enumerate(before)}
    common = [key for key in after if key in position]
    in_order = _increasing([position[key] for key in common])
    return [key for at, key in enumerate(common) if at not in in_order]


def _increasing(numbers: Sequence[int]) -> set[int]:
    """Where the numbers of a longest increasing run stand."""
    tails: list[int] = []
    ends: list[int] = []
    before: list[int] = []
    for at, number in enumerate(numbers):
        place = bisect_left(tails, number)
        if place == len(tails):
            tails.append(number)
            ends.append(at)
        else:
            tails[place], ends[place] = number, at
        before.append(ends[place - 1] if place else -1)
    found: set[int] = set()
    at = ends[-1] if ends else -1
    while at >= 0:
        found.add(at)
        at = before[at]
    return found
