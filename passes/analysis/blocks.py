"""Keep or recompute, for one block of the forward: the cheapest choice within a number of bytes, exactly.

A value that the backward needs is kept, or its maker runs again in the backward, which in turn needs that maker's
operands. For a price on bytes the cheapest choice is a minimum cut (keeping pays bytes, running again pays time, and
running again implies that the operands are there): the project selection problem of Picard, "Maximal closure of a
graph", 1976. The choices for all prices are the lower convex hull of what can be had; between its corners, branch and
bound with the cut as the bound.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf

import networkx as nx
from networkx.algorithms.flow import boykov_kolmogorov

MAX_WORK = 1_000
"""How often the search between two corners may relax a block, times its makers."""


_THERE, _ABSENT = ("side", "there"), ("side", "absent")


@dataclass(frozen=True, slots=True)
class Maker:
    """A node of the forward.

    Args:
        us: duration of running it again, in microseconds.
        reads: the values that it needs, by number; those that are there in any case left out.
        makes: the values that it makes.
        runs_again: whether it may.
    """

    us: float
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    runs_again: bool = True


@dataclass(frozen=True)
class Block:
    """A block of the forward, and which of its values to keep. Values without a maker come from other blocks.

    Args:
        num_bytes: bytes that keeping each value takes.
        may_keep: whether each value may be kept. Views may not: their maker, which costs nothing, runs again.
        makers: the block's nodes.
        needed: the values that the backward reads.
    """

    num_bytes: tuple[int, ...]
    may_keep: tuple[bool, ...]
    makers: tuple[Maker, ...]
    needed: frozenset[int]

    @cached_property
    def maker_of(self) -> dict[int, int]:
        """The number of the maker of each value that has one."""
        return {value: number for number, maker in enumerate(self.makers) for value in maker.makes}


@dataclass(frozen=True)
class Choice:
    """The values that are kept, with their bytes, and the makers that run again, with their time."""

    kept: frozenset[int]
    again: frozenset[int]
    num_bytes: int
    us: float


def chosen(block: Block, kept: Iterable[int]) -> Choice | None:
    """The choice that keeps these values; None if the backward would then miss a value that cannot be recomputed."""
    held = frozenset(kept)
    again: set[int] = set()
    used: set[int] = set()
    todo, seen = list(block.needed), set(block.needed)
    while todo:
        value = todo.pop()
        if value in held:
            used.add(value)
            continue
        number = block.maker_of.get(value)
        if number is None or not block.makers[number].runs_again:
            return None
        again.add(number)
        for other in block.makers[number].reads:
            if other not in seen:
                seen.add(other)
                todo.append(other)
    us = sum(block.makers[n].us for n in again)
    return Choice(frozenset(used), frozenset(again), sum(block.num_bytes[v] for v in used), us)


def cheapest(block: Block, us_per_byte: float) -> Choice | None:
    """The choice with the lowest time plus price of its bytes; None if there is no choice at all."""
    graph = nx.DiGraph()
    graph.add_nodes_from((_THERE, _ABSENT))
    for value in block.needed:
        graph.add_edge(_THERE, ("value", value))
    reached, todo = set(block.needed), list(block.needed)
    while todo:
        value = todo.pop()
        number = block.maker_of.get(value)
        runs_again = number is not None and block.makers[number].runs_again
        price = us_per_byte * block.num_bytes[value] if block.may_keep[value] else None
        if not runs_again:
            _edge(graph, ("value", value), _ABSENT, price)
            continue
        assert number is not None
        _edge(graph, ("value", value), ("maker", number), price)
        graph.add_edge(("maker", number), _ABSENT, capacity=block.makers[number].us)
        for other in block.makers[number].reads:
            graph.add_edge(("maker", number), ("value", other))
            if other not in reached:
                reached.add(other)
                todo.append(other)
    try:
        _, (there, _) = nx.minimum_cut(graph, _THERE, _ABSENT, flow_func=boykov_kolmogorov)
    except nx.NetworkXUnbounded:
        return None
    again = {number for kind, number in there if kind == "maker"}
    return chosen(block, (v for kind, v in there if kind == "value" and block.maker_of.get(v) not in again))


def _edge(graph: nx.DiGraph, tail: object, head: object, capacity: float | None) -> None:
    """An edge that costs `capacity` to cut; without one it is never cut."""
    graph.add_edge(tail, head, **({} if capacity is None else {"capacity": capacity}))


def frontier(block: Block) -> tuple[Choice, ...]:
    """The corners of the convex hull, from the most bytes and the least time to the fewest bytes.

    Returns:
        Nothing if there is no choice at all.
    """
    ends = _ends(block)
    if ends is None:
        return ()
    most, least = ends
    kept: list[Choice] = []
    for corner in (most, *_between(block, most, least), least):
        if not kept or corner.num_bytes < kept[-1].num_bytes:
            kept.append(corner)
    return tuple(kept)


def around(block: Block, headroom: int) -> tuple[Choice, ...]:
    """The last corner with more than `headroom` bytes and the first that fits; one alone where all fit, or none does.

    Returns:
        Nothing if there is no choice at all.
    """
    ends = _ends(block)
    if ends is None:
        return ()
    high, low = ends
    if high.num_bytes <= headroom:
        return (high,)
    if low.num_bytes > headroom:
        return (low,)
    while (found := _middle(block, high, low)) is not None:
        high, low = (high, found) if found.num_bytes <= headroom else (found, low)
    return high, low


def _ends(block: Block) -> tuple[Choice, Choice] | None:
    """The corner of the least time, and that of the fewest bytes; None if there is no choice at all."""
    least = cheapest(block, 1.0 + sum(m.us for m in block.makers))
    if least is None:
        return None
    return _kept_at_need(block) or cheapest(block, 1e-12) or least, least


def _kept_at_need(block: Block) -> Choice | None:
    """All that the backward needs is kept, but for views."""
    return chosen(block, (v for v, may in enumerate(block.may_keep) if may))


def _between(block: Block, high: Choice, low: Choice) -> list[Choice]:
    """The corners between two others."""
    found = _middle(block, high, low)
    return [] if found is None else [*_between(block, high, found), found, *_between(block, found, low)]


def _middle(block: Block, high: Choice, low: Choice) -> Choice | None:
    """A corner between two others; None if there is none."""
    if high.num_bytes <= low.num_bytes or low.us <= high.us:
        return None
    price = (low.us - high.us) / (high.num_bytes - low.num_bytes)
    found = cheapest(block, price)
    line = high.us + price * high.num_bytes
    if found is None or found.us + price * found.num_bytes >= line * (1 - 1e-9) - 1e-9:
        return None
    return found


def within(block: Block, max_bytes: int) -> Choice | None:
    """The choice with the lowest time that keeps at most `max_bytes`; None if there is none.

    Exact, unless the search takes more than MAX_WORK: then the best that it found.
    """
    return _Search(block, max_bytes).run()


class _Search:
    """Depth first over values kept and not kept, cut off where even a relaxed choice is no better than the best."""

    def __init__(self, block: Block, max_bytes: int) -> None:
        self.block, self.max_bytes = block, max_bytes
        self.best: Choice | None = None
        self.best_us = inf
        self.left = MAX_WORK

    def run(self) -> Choice | None:
        self.branch(self.block, frozenset())
        return self.best

    def take(self, choice: Choice) -> None:
        if choice.num_bytes <= self.max_bytes and choice.us < self.best_us:
            self.best, self.best_us = choice, choice.us

    def branch(self, block: Block, kept: frozenset[int]) -> None:
        """`block` with its needs met by `kept` taken out of it."""
        headroom = self.max_bytes - sum(self.block.num_bytes[v] for v in kept)
        if self.left <= 0 or headroom < 0:
            return
        self.left -= len(block.makers)
        corners = around(block, headroom)
        for corner in corners:
            if (found := chosen(self.block, corner.kept | kept)) is not None:
                self.take(found)
        if len(corners) < 2:
            return
        high, low = corners
        if _bound(high, low, headroom) >= self.best_us - 1e-9:
            return
        value = max((high.kept ^ low.kept) - kept, key=lambda v: block.num_bytes[v])
        self.branch(_given(block, value), kept | {value})
        self.branch(_refused(block, value), kept)


def _bound(high: Choice, low: Choice, headroom: int) -> float:
    """The time of the hull at `headroom`, which lies between two corners: no choice is below it."""
    share = (high.num_bytes - headroom) / (high.num_bytes - low.num_bytes)
    return high.us + share * (low.us - high.us)


def _given(block: Block, value: int) -> Block:
    """The block where a value is there for nothing."""
    num_bytes = tuple(0 if v == value else b for v, b in enumerate(block.num_bytes))
    return replace(block, num_bytes=num_bytes)


def _refused(block: Block, value: int) -> Block:
    """The block where a value may not be kept."""
    return replace(block, may_keep=tuple(may and v != value for v, may in enumerate(block.may_keep)))
