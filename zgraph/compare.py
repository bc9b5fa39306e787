"""What differs between two graphs, line by line of their texts.

A node is known by what it makes; one that makes nothing, by its op and what it reads. Names stay from pass to pass, so
that a node can be followed. What is in both graphs but not on a longest run that has the same order in both has moved
(Hunt, Szymanski: "A fast algorithm for computing longest common subsequences", 1977). Texts are compared and not graphs
because a graph of 80 layers takes a second to parse, and its lines say all that is asked here.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from zgraph.ir import Origin

_STRING = r'"(?:[^"\\]|\\.)*"'
_ORIGIN = re.compile(rf"(?: @ (?P<module>{_STRING}))?(?: (?P<file>{_STRING}):(?P<line>\d+))?(?: by (?P<by>[\w-]+))?$")
_NODE = re.compile(r"(?:fwd|bwd|upd) (?:%(?P<made>[^\s:]+): .*? = )?(?P<op>[\w.]+)\((?P<args>.*)")


@dataclass(frozen=True)
class Line:
    """A node as its line: what it is known by, its op, its text, and behind that where it comes from."""

    key: str
    op: str
    text: str
    place: str = field(default="", compare=False)

    @property
    def origin(self) -> Origin:
        """Where the node comes from."""
        found = _ORIGIN.fullmatch(self.place)
        if found is None:
            return Origin()
        module, file = (json.loads(found[name] or '""') for name in ("module", "file"))
        return Origin(module, file, int(found["line"] or 0), found["by"] or "")


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
            "added": self.added, "removed": self.removed, "changed": [new for _, new in self.changed],
            "moved": self.moved,
        }  # fmt: skip
        return {kind: dict(Counter(line.op for line in lines).most_common()) for kind, lines in kinds.items()}


def node_lines(text: str) -> Mapping[str, Line]:
    """Every node of a graph's text by what it is known by, in order."""
    found: dict[str, Line] = {}
    counts: Counter[str] = Counter()
    for line in text.splitlines():
        if (node := _NODE.match(line)) is None:
            continue
        bare = line[: _origin_at(line)]
        key = node["made"] or f"{node['op']}({node['args'][: _origin_at(node['args'])]}"
        counts[key] += 1
        key = key if counts[key] == 1 else f"{key}#{counts[key]}"
        found[key] = Line(key, node["op"], bare, line[len(bare) :])
    return found


def _origin_at(line: str) -> int:
    """Where in a line it begins to say where the node comes from."""
    found = _ORIGIN.search(line)
    return found.start() if found else len(line)


def compare(before: str, after: str) -> Difference:
    """What differs between the texts of two graphs."""
    old, new = node_lines(before), node_lines(after)
    return Difference(
        tuple(line for key, line in new.items() if key not in old),
        tuple(line for key, line in old.items() if key not in new),
        tuple((old[key], line) for key, line in new.items() if key in old and old[key].text != line.text),
        tuple(new[key] for key in moved(list(old), list(new))),
    )


def moved(before: Sequence[str], after: Sequence[str]) -> list[str]:
    """What is in both, but not on a longest run that has the same order in both."""
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
