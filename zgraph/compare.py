"""What differs between two graphs, node by node.

A node is known by what it makes; one that makes nothing, by its op and what it reads. Names stay from pass to pass, so
that a node can be followed. What is in both graphs but not on a longest run that has the same order in both has moved
(Hunt, Szymanski: "A fast algorithm for computing longest common subsequences", 1977).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from zgraph.ir import Graph, Node, print_node


@dataclass(frozen=True)
class Difference:
    """From one graph to another.

    Args:
        added: nodes that are only in the second.
        removed: nodes that are only in the first.
        changed: nodes that are another text than before, each with what it was.
        moved: nodes that are the same, but elsewhere among those that stayed.
    """

    added: tuple[Node, ...]
    removed: tuple[Node, ...]
    changed: tuple[tuple[Node, Node], ...]
    moved: tuple[Node, ...]

    @property
    def stat(self) -> dict[str, dict[str, int]]:
        """How many nodes of each op were added, removed, changed and moved."""
        kinds = {
            "added": self.added, "removed": self.removed, "changed": [new for _, new in self.changed],
            "moved": self.moved,
        }  # fmt: skip
        return {kind: dict(Counter(n.op for n in nodes).most_common()) for kind, nodes in kinds.items()}


def keyed(graph: Graph) -> Mapping[str, Node]:
    """Every node by what it is known by."""
    found: dict[str, Node] = {}
    counts: Counter[str] = Counter()
    for node in graph.nodes:
        key = node.name if node.results else f"{node.op}({', '.join(v.name for v in node.operands)})"
        counts[key] += 1
        found[key if counts[key] == 1 else f"{key}#{counts[key]}"] = node
    return found


def compare(before: Graph, after: Graph) -> Difference:
    """What differs."""
    old, new = keyed(before), keyed(after)
    common = [key for key in new if key in old]
    position = {key: at for at, key in enumerate(old)}
    in_order = _increasing([position[key] for key in common])
    return Difference(
        tuple(node for key, node in new.items() if key not in old),
        tuple(node for key, node in old.items() if key not in new),
        tuple((old[key], new[key]) for key in common if _text(old[key]) != _text(new[key])),
        tuple(new[key] for at, key in enumerate(common) if at not in in_order),
    )


def _text(node: Node) -> str:
    return print_node(node, origins=False)


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
