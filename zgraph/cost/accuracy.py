"""Error bars: how far what is measured lies from what is predicted, by what others published.

Intervals are split conformal (Vovk, Gammerman, Shafer: "Algorithmic Learning in a Random World", 2005; systems in the
place of single points as in Dunn, Wasserman, Ramdas: "Distribution-free prediction sets for two-layer hierarchical
models", 2022): the constants of a profile are fitted without one system, whose steps are then predicted, and so on for
each; the quantiles of measured over predicted are the interval of a system that nobody has seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

LEVEL = 0.8
"""Share of measurements that an interval is to cover."""

WIDER_PER_DOUBLING = 0.15
"""How much wider, in units of its width, an interval is for each doubling beyond what was published. This and the next
are such that of the published rows, each of a system left out, four in five are covered."""

WIDER_UNKNOWN = 0.25
"""The same where the kernel of attention has no rate of its own in the profile."""

EXACT_BELOW = 1e-6


class Accuracy(BaseModel):
    """How true a profile's predictions are: quantiles of measured over predicted.

    Args:
        time_low, time_high: those of steps.
        memory_low, memory_high: those of peaks; on GPUs estimates, not made of measurements.
        max_ranks: of the steps that were published.
        max_sequence: keys of the longest attention among them.
        source: where those of steps are from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    time_low: float = Field(gt=0, le=1)
    time_high: float = Field(ge=1)
    memory_low: float = Field(gt=0, le=1)
    memory_high: float = Field(ge=1)
    max_ranks: int = Field(gt=0)
    max_sequence: int = Field(gt=0)
    source: str = ""

    def time(self, value: float, *, num_ranks: int = 1, sequence: int = 0, is_known: bool = True) -> Interval:
        """Interval of a time.

        Args:
            value: as predicted, in any unit.
            num_ranks: of the job.
            sequence: keys of the longest attention; 0 where there is none.
            is_known: whether the kernel of attention has a rate in the profile.
        """
        beyond = _doublings(num_ranks, self.max_ranks) + _doublings(sequence, self.max_sequence)
        width = 1 + WIDER_PER_DOUBLING * beyond + (0 if is_known else WIDER_UNKNOWN)
        return Interval(value * self.time_low**width, value, value * self.time_high**width)

    def memory(self, value: float) -> Interval:
        """Interval of a peak, in any unit."""
        return Interval(value * self.memory_low, value, value * self.memory_high)


UNKNOWN = Accuracy(
    time_low=0.7,
    time_high=2.0,
    memory_low=0.85,
    memory_high=1.35,
    max_ranks=8,
    max_sequence=8192,
    source="none of this hardware: rates of data sheets, which steps are mostly slower than",
)
"""For profiles that were compared with nothing."""

PROCESSOR = UNKNOWN.model_copy(
    update={
        "memory_low": 0.991,
        "memory_high": 1.009,
        "source": "peaks: at most 0.9 % on transformers that no test has; times: compared with nothing",
    }
)
"""For profiles of processors that were compared with nothing: torch's allocator there is followed allocation by
allocation."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Prediction, and the bounds between which four of five measurements lie."""

    low: float
    value: float
    high: float

    def scaled(self, factor: float) -> Interval:
        """The interval in another unit."""
        return Interval(self.low * factor, self.value * factor, self.high * factor)

    def is_tied(self, other: Interval) -> bool:
        """Whether the two values differ by less than either is certain to."""
        first, second = sorted((self, other), key=lambda found: found.value)
        return second.value <= first.high or second.low <= first.value

    def text(self, unit: str = "") -> str:
        """The interval for people, with no digit that the bounds do not know: `3.6 s (80 %: 3.2 to 4.1)`."""
        value = f"{self.value:,.{self.digits}f} {unit}".rstrip()
        return f"{value} ({self.bounds})" if self.low < self.high else value

    @property
    def bounds(self) -> str:
        """The bounds for people, `80 %: 3.2 to 4.1`."""
        low, high = (f"{v:,.{self.digits}f}" for v in (self.low, self.high))
        return f"{100 * LEVEL:.0f} %: {low} to {high}"

    @property
    def digits(self) -> int:
        """Digits behind the point that mean something: two of the value, more where the bounds are closer."""
        width = self.high - self.low
        if self.value <= 0 or width <= EXACT_BELOW * self.value:
            return 2
        known = max(math.ceil(math.log10(10 * self.value / width)), 1)
        return min(max(known - 1 - math.floor(math.log10(self.value)), 0), 3)


def time_text(us: Interval) -> str:
    """An interval of microseconds for people, in the largest unit that its value fills."""
    for unit, factor in (("s", 1e6), ("ms", 1e3)):
        if us.value >= factor:
            return us.scaled(1 / factor).text(unit)
    return us.text("us")


def bytes_text(num_bytes: Interval) -> str:
    """An interval of bytes for people, in the largest unit that its value fills."""
    for unit, exponent in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if num_bytes.value >= 2**exponent:
            return num_bytes.scaled(2.0**-exponent).text(unit)
    return num_bytes.text("B")


def _doublings(number: float, most: float) -> float:
    return math.log2(number / most) if number > most else 0.0
