"""When to start each transfer, exactly: the longest path for a fixed order, and a search over orders on top of it.

Computing runs its ops in a fixed order. A lane carries transfers in its own order; there is one for collectives,
and one for copies to the host and for those from it. A transfer may start after a given op, and an op may wait for it.
While a transfer holds memory that is not needed yet, there must be headroom for it.

For fixed orders, starting every transfer as soon as there is headroom is optimal. What it holds ends at a fixed op, and
later transfers start later in any case, so starting it early takes no headroom from them: each may be placed at its
earliest in turn, and no placement is faster. Where several lanes compete for headroom, those first in the common order
have it.

Of all fastest placements the latest is taken: it holds memory for the least time. What starts late for no reason but
the clock starts `slack` of its own duration early, because clocks are wrong.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import inf

MAX_WORK = 400_000
"""Ops and transfers that a search walks over in all: large problems are searched less."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """One collective.

    Args:
        us: what it takes on the lane.
        first: it may start before the op of this number, not earlier.
        due: the op of this number waits for it; the number of ops if only the end of the step does.
        num_bytes: what it holds from its start until op `until` begins, beyond what that op needs.
        until: as above; at most `due` for a gather, whose memory counts among the op's own from then on. What takes
            memory away (a reduction, a copy to the host) holds it from `first` on, whenever it starts: `until` is
            `first` then.
        lane: which lane carries it.
    """

    us: float
    first: int
    due: int
    num_bytes: int = 0
    until: int = 0
    lane: str = "comm"

    @property
    def frees(self) -> bool:
        """Whether it takes memory away: the sooner it starts, the better."""
        return self.until <= self.first


@dataclass(frozen=True)
class Problem:
    """A step to schedule.

    Args:
        compute_us: what each op takes, in order.
        headroom: bytes that may be held beside each op.
        transfers: all of them, in no particular order.
    """

    compute_us: tuple[float, ...]
    headroom: tuple[int, ...]
    transfers: tuple[Transfer, ...]

    @property
    def num_ops(self) -> int:
        return len(self.compute_us)

    @property
    def lower_bound_us(self) -> float:
        """The largest of: all computing, all of a lane, and the critical path if memory and the lanes were free."""
        begins = list(accumulate(self.compute_us, initial=0.0))
        ends = begins[-1]
        tails = [begins[t.first] + t.us + begins[-1] - begins[t.due] for t in self.transfers]
        lanes: dict[str, float] = defaultdict(float)
        for transfer in self.transfers:
            lanes[transfer.lane] += transfer.us
        return max([ends, *lanes.values(), *tails])


@dataclass(frozen=True)
class Timetable:
    """A placement of every transfer.

    Args:
        order: the transfers' numbers in an order that each lane keeps to.
        starts: for each transfer (by its number) the op before which it is started.
        begins_us: when the lane begins it.
        ops_us: when each op begins; the last entry is when the last one ends.
        makespan_us: when all is over.
        stalls: op, the transfer that it waits for, and for how long.
    """

    order: tuple[int, ...]
    starts: tuple[int, ...]
    begins_us: tuple[float, ...]
    ops_us: tuple[float, ...]
    makespan_us: float
    stalls: tuple[tuple[int, int, float], ...]


def evaluate(problem: Problem, order: Sequence[int]) -> Timetable | None:
    """The fastest timetable with this order of the lanes; None if no placement has room.

    Where a reduction has no room, transfers that take memory are put off, but no other reduction is: a placement that
    needs that as well is not found.
    """
    starts = earliest_starts(problem, order)
    return None if starts is None else run(problem, order, starts)


def earliest_starts(problem: Problem, order: Sequence[int]) -> tuple[int, ...] | None:
    """For each transfer the earliest op before which it may start; None if none is found with room for all."""
    headroom = HeadroomTree(problem.headroom)
    starts = [0] * len(order)
    last: dict[str, int] = {}
    for at, number in enumerate(order):
        transfer = problem.transfers[number]
        earliest = max(last.get(transfer.lane, 0), transfer.first)
        if transfer.frees:
            begin, end = transfer.first, earliest
            for other in reversed(order[:at]):
                if headroom.last_below(transfer.num_bytes, end) < begin:
                    break
                _put_off(problem, order[: at + 1], other, starts, earliest, headroom)
            if headroom.last_below(transfer.num_bytes, end) >= begin:
                return None
        else:
            earliest = max(earliest, headroom.last_below(transfer.num_bytes, transfer.until) + 1)
            begin, end = earliest, transfer.until
        if earliest > transfer.due:
            return None
        headroom.take(transfer.num_bytes, begin, end)
        starts[number] = last[transfer.lane] = earliest
    return tuple(starts)


def _put_off(
    problem: Problem, order: Sequence[int], number: int, starts: list[int], latest: int, headroom: HeadroomTree
) -> None:
    """Start a transfer that takes memory as late as what comes after it in its lane allows: `latest`, or that one's
    start."""
    transfer = problem.transfers[number]
    if transfer.frees:
        return
    behind = [o for o in order[order.index(number) + 1 : -1] if problem.transfers[o].lane == transfer.lane]
    if behind:
        latest = starts[behind[0]]
    elif problem.transfers[order[-1]].lane != transfer.lane:
        latest = transfer.due
    until = min(latest, transfer.due)
    if until > starts[number]:
        headroom.take(-transfer.num_bytes, starts[number], min(until, transfer.until))
        starts[number] = until


def run(problem: Problem, order: Sequence[int], starts: Sequence[int]) -> Timetable:
    """The clock: ops and transfers one after the other, each when what it needs is there."""
    num_ops = problem.num_ops
    waits: dict[int, list[int]] = defaultdict(list)
    for number, transfer in enumerate(problem.transfers):
        waits[transfer.due].append(number)
    begins, ends = [0.0] * len(order), [0.0] * len(order)
    ops: list[float] = []
    stalls: list[tuple[int, int, float]] = []
    now = 0.0
    free: dict[str, float] = {}
    before: dict[int, list[int]] = defaultdict(list)
    for number in order:
        before[starts[number]].append(number)
    for op in range(num_ops + 1):
        for number in before[op]:
            transfer = problem.transfers[number]
            begins[number] = max(now, free.get(transfer.lane, 0.0))
            ends[number] = free[transfer.lane] = begins[number] + transfer.us
        last = max(waits[op], key=lambda n: ends[n], default=None)
        if last is not None and ends[last] > now:
            stalls.append((op, last, ends[last] - now))
            now = ends[last]
        ops.append(now)
        if op < num_ops:
            now += problem.compute_us[op]
    return Timetable(tuple(order), tuple(starts), tuple(begins), tuple(ops), now, tuple(stalls))


def delayed(problem: Problem, found: Timetable, slack: float = 0.0) -> Timetable:
    """The same timetable with all that takes memory started as late as the clock allows: as fast, holding least."""
    latest = [0.0] * len(found.order)
    limits: dict[str, float] = {}
    for number in reversed(found.order):
        transfer = problem.transfers[number]
        limit = min(limits.get(transfer.lane, inf), found.ops_us[transfer.due]) - transfer.us
        limits[transfer.lane] = latest[number] = max(limit, found.begins_us[number])
    starts = list(found.starts)
    ceilings: dict[str, int] = {}
    for number in reversed(found.order):
        transfer = problem.transfers[number]
        at_us = latest[number] - slack * transfer.us
        op = (
            found.starts[number] if transfer.frees else max(bisect_right(found.ops_us, at_us) - 1, found.starts[number])
        )
        ceilings[transfer.lane] = starts[number] = min(op, transfer.due, ceilings.get(transfer.lane, problem.num_ops))
    return run(problem, found.order, starts)


def first_use_order(problem: Problem) -> tuple[int, ...]:
    """Transfers in the order in which they are needed; those that take memory away, when they can first start.

    There is always a placement with this order: each may start then, and holds nothing.
    """
    return tuple(sorted(range(len(problem.transfers)), key=lambda n: _position(problem.transfers[n])))


def _position(transfer: Transfer) -> tuple[int, bool]:
    """The op that it goes before, and whether it goes after others that do."""
    return (transfer.first, True) if transfer.frees else (transfer.due, False)


def latest_first_order(problem: Problem) -> tuple[int, ...]:
    """Whenever the lane is free: what must go now to be in time, else what can go without being waited for.

    Gathers that have time let reductions pass, which frees memory and leaves less for the end of the step.
    """
    transfers = problem.transfers
    clock = list(accumulate(problem.compute_us, initial=0.0))
    needed = [n for n in first_use_order(problem) if transfers[n].due < problem.num_ops]
    free = [n for n in first_use_order(problem) if transfers[n].due == problem.num_ops]
    latest: dict[int, float] = {}
    limit = inf
    for number in reversed(needed):
        limit = latest[number] = min(limit, clock[transfers[number].due]) - transfers[number].us
    order: list[int] = []
    now, i, j = 0.0, 0, 0
    while i < len(needed) or j < len(free):
        if j < len(free):
            candidate = free[j]
            begin = max(now, clock[transfers[candidate].first])
            if i == len(needed) or (
                begin + transfers[candidate].us <= latest[needed[i]] or clock[transfers[needed[i]].first] > begin
            ):
                order.append(candidate)
                now, j = begin + transfers[candidate].us, j + 1
                continue
        number = needed[i]
        order.append(number)
        now, i = max(now, clock[transfers[number].first]) + transfers[number].us, i + 1
    return tuple(order)


def search(problem: Problem, effort: int = 200) -> Timetable:
    """The best timetable found: first-use order, latest-first order, and swaps around what computing waits for.

    Never slower than first-use order. `effort` bounds how many orders are tried beyond those two.
    """
    tried = [
        evaluate(problem, order) for order in dict.fromkeys((first_use_order(problem), latest_first_order(problem)))
    ]
    best = min((t for t in tried if t is not None), key=lambda t: t.makespan_us)
    bound = problem.lower_bound_us
    effort = min(effort, MAX_WORK // (1 + problem.num_ops + len(problem.transfers)))
    improved = True
    while improved and effort > 0 and best.makespan_us > bound * (1 + 1e-9):
        improved = False
        for order in _neighbours(best):
            effort -= 1
            candidate = evaluate(problem, order)
            if candidate is not None and candidate.makespan_us < best.makespan_us - 1e-9:
                best, improved = candidate, True
                break
            if effort <= 0:
                break
    return best


def _neighbours(timetable: Timetable) -> Iterator[tuple[int, ...]]:
    """Orders in which a transfer that something waits for goes before one of those that went before it, longest wait
    first."""
    place = {number: at for at, number in enumerate(timetable.order)}
    for _, number, _ in sorted(timetable.stalls, key=lambda s: -s[2]):
        at = place[number]
        for to in range(at - 1, max(at - 9, -1), -1):
            order = list(timetable.order)
            order.insert(to, order.pop(at))
            yield tuple(order)
    for at in range(len(timetable.order) - 1):
        order = list(timetable.order)
        order[at], order[at + 1] = order[at + 1], order[at]
        yield tuple(order)


class HeadroomTree:
    """Bytes left beside each op, with the two questions that placing asks, each in logarithmic time.

    A segment tree of minima with lazy subtraction.
    """

    def __init__(self, headroom: Sequence[int]) -> None:
        self.size = 1 << max(len(headroom) - 1, 0).bit_length()
        self.low = [inf] * (2 * self.size)
        self.low[self.size : self.size + len(headroom)] = headroom
        for node in range(self.size - 1, 0, -1):
            self.low[node] = min(self.low[2 * node], self.low[2 * node + 1])
        self.taken = [0] * (2 * self.size)

    def take(self, num_bytes: int, begin: int, end: int) -> None:
        """Take bytes beside the ops from `begin` to before `end`."""
        if begin >= end:
            return
        left, right = begin + self.size, end + self.size
        first, last = left, right - 1
        while left < right:
            if left & 1:
                self._lower(left, num_bytes)
                left += 1
            if right & 1:
                right -= 1
                self._lower(right, num_bytes)
            left, right = left >> 1, right >> 1
        for leaf in (first, last):
            node = leaf >> 1
            while node:
                self.low[node] = min(self.low[2 * node], self.low[2 * node + 1]) - self.taken[node]
                node >>= 1

    def _lower(self, node: int, num_bytes: int) -> None:
        self.low[node] -= num_bytes
        self.taken[node] += num_bytes

    def last_below(self, num_bytes: int, end: int) -> int:
        """The last op before `end` that has less headroom than `num_bytes`; -1 if none has."""
        return self._last_below(1, 0, self.size, num_bytes, end)

    def _last_below(self, node: int, begin: int, stop: int, num_bytes: int, end: int) -> int:
        if begin >= end or self.low[node] >= num_bytes:
            return -1
        if node >= self.size:
            return begin
        middle, needed = (begin + stop) // 2, num_bytes + self.taken[node]
        found = self._last_below(2 * node + 1, middle, stop, needed, end)
        return found if found >= 0 else self._last_below(2 * node, begin, middle, needed, end)
