"""Time limits of tests: seconds of a machine that has nothing else to do. One that is busy gets as many times more."""

from __future__ import annotations

import os
import time

MOST = 12.0
"""The most that a limit is lengthened."""


def slowness() -> float:
    """How many processes want to run for each processor here, over the last minute; 1 at least."""
    return min(max(os.getloadavg()[0] / (os.cpu_count() or 1), 1.0), MOST)


class Deadline:
    """The end of a time limit, by how busy the machine was at most since it began.

    Args:
        seconds: the limit on a machine that has nothing else to do.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.began = seconds, time.monotonic()
        self._most = slowness()

    def left(self) -> float:
        """Seconds until then; 0 afterwards."""
        self._most = max(self._most, slowness())
        return max(self.began + self.seconds * self._most - time.monotonic(), 0.0)

    def shorten(self, seconds: float) -> None:
        """Have it end in so many seconds, if that is sooner."""
        other = Deadline(seconds)
        if other.left() < self.left():
            self.seconds, self.began, self._most = other.seconds, other.began, other._most
