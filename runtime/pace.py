"""How long the calls of a rank take, and how much of that it waits for others: who is slow, and where.

Ranks that train together take equally long for a step, as all wait for the slowest. What differs is how long each
computes: its step without its waits. A rank says so with each beat of its heart, and whoever looks reads the beats.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

WINDOW_S = 1.0
"""Of calls that a mean is of, at least."""
MOST = 1e15
"""Of calls and seconds in a heartbeat. A word that says more, or no number, is not believed."""
SLOW = 1.1
"""How many times longer than the median rank one computes that is called slow."""
WAITS = 0.2
"""The part of its time from which on a rank is said to wait for links."""


@dataclass(frozen=True)
class Paced:
    """Means over a rank's last calls of its models.

    Args:
        calls: how many there have been so far.
        call_s: from the begin of one to the begin of the next.
        waits_s: in each, in which the rank stood still for others.
        at: the node that it waited for longest; empty if it did not wait.
    """

    calls: int
    call_s: float
    waits_s: float
    at: str

    @property
    def computes_s(self) -> float:
        """Seconds of a call in which the rank did not wait."""
        return max(self.call_s - self.waits_s, 0.0)


class Pace:
    """Counts the calls of this rank and its waits. What it costs does not depend on how many there are.

    Args:
        clock: seconds that grow.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._calls = self._before = 0
        self._since = clock()
        self._waits: dict[str, float] = {}
        self.last: Paced | None = None

    def begin_call(self) -> None:
        """A call of a model begins."""
        now, num = self._clock(), self._calls - self._before
        self._calls += 1
        if not num:
            self._since = now
            self._waits.clear()
        elif now - self._since >= WINDOW_S:
            waits, self._waits = self._waits, {}
            longest = max(waits, key=lambda what: waits[what], default="")
            self.last = Paced(self._calls, (now - self._since) / num, sum(waits.values()) / num, longest)
            self._before, self._since = self._calls - 1, now

    def waited(self, what: str, seconds: float) -> None:
        """A wait of the main thread is over."""
        self._waits[what] = self._waits.get(what, 0.0) + seconds

    def word(self) -> dict[str, Any]:
        """The means, as a heartbeat has them; empty before there are some."""
        return asdict(self.last) if self.last is not None else {}


def parse_pace(word: Mapping[str, Any]) -> Paced | None:
    """The means that a heartbeat has; None of one that has none, or others than these."""
    if not {"calls", "call_s", "waits_s", "at"} <= word.keys():
        return None
    calls, call_s, waits_s, at = (word[name] for name in ("calls", "call_s", "waits_s", "at"))
    if not isinstance(at, str) or type(calls) is not int or not all(map(_is_time, (calls, call_s, waits_s))):
        return None
    return Paced(calls, float(call_s), float(waits_s), at)


def _is_time(number: object) -> bool:
    return type(number) in (int, float) and 0 <= number <= MOST  # type: ignore[operator]


def slowest(paces: Mapping[int, Paced]) -> str:
    """Which rank is slow, at which node the others wait, and whether it is its computing or the links; else empty.

    Args:
        paces: by rank.
    """
    if len(paces) < 2:
        return ""
    usual = median(pace.computes_s for pace in paces.values())
    rank = max(paces, key=lambda r: paces[r].computes_s)
    factor = paces[rank].computes_s / usual if usual else 1.0
    others = [pace for r, pace in paces.items() if r != rank]
    at = _most((pace.at, pace.waits_s) for pace in others)
    if factor >= SLOW and at:
        return f"rank {rank} is slowest: it computes {factor:.2f} times as long as the median, and others wait at {at}"
    share = median(pace.waits_s / pace.call_s if pace.call_s else 0.0 for pace in paces.values())
    at = _most((pace.at, pace.waits_s) for pace in paces.values())
    if share >= WAITS and at:
        return f"all ranks compute alike, and wait {share:.0%} of a step for links, most at {at}"
    return ""


def _most(found: Iterable[tuple[str, float]]) -> str:
    """The node that takes most seconds of all."""
    seconds: dict[str, float] = {}
    for what, waited in found:
        if what:
            seconds[what] = seconds.get(what, 0.0) + waited
    return max(seconds, key=lambda what: seconds[what], default="")
