"""Intervals from what was left out, and how often they would have been right."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.published.fit import row_weight
from benchmarks.published.rows import Row
from zgraph.cost import Accuracy
from zgraph.cost.accuracy import LEVEL

MEMORY_BOUNDS = 0.85, 1.35
"""Measured over predicted peaks on GPUs: those of published rows that say what of them is reserved or allocated."""


@dataclass(frozen=True)
class Residual:
    """Measured over predicted of a row whose family the constants have not seen."""

    row: Row
    predicted_s: float

    @property
    def family(self) -> str:
        return self.row.family

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted_s / self.row.measured_s - 1

    @property
    def log_ratio(self) -> float:
        return math.log(self.row.measured_s / self.predicted_s)


def bounds(residuals: Sequence[Residual], left_out: str = "") -> tuple[float, float]:
    """Quantiles of measured over predicted between which `LEVEL` of what others measured lies.

    A family counts as its rows do in the fit.

    Args:
        residuals: of left-out rows.
        left_out: a family that the bounds are to be tried on.
    """
    counts = Counter(r.family for r in residuals)
    used = sorted((r for r in residuals if r.family != left_out), key=lambda r: r.log_ratio)
    weights = [1 / row_weight(counts[r.family]) for r in used]
    total = sum(weights)
    tail = (1 - LEVEL) / 2
    low = _at([r.log_ratio for r in used], weights, tail * total)
    high = _at([r.log_ratio for r in used], weights, total - tail * total)
    return math.exp(min(low, 0)), math.exp(max(high, 0))


def _at(values: Sequence[float], weights: Sequence[float], position: float) -> float:
    """The first value at which so much weight is reached."""
    sum_before = 0.0
    for value, weight in zip(values, weights, strict=True):
        sum_before += weight
        if sum_before >= position:
            return value
    return values[-1]


def accuracy(residuals: Sequence[Residual], left_out: str = "") -> Accuracy:
    """Accuracy that a profile has by what was left out, but for one family."""
    low, high = bounds(residuals, left_out)
    used = [r.row for r in residuals if r.family != left_out]
    return Accuracy(
        time_low=round(low, 3),
        time_high=round(high, 3),
        memory_low=MEMORY_BOUNDS[0],
        memory_high=MEMORY_BOUNDS[1],
        max_ranks=max(row.num_ranks for row in used),
        max_sequence=max(row.sequence for row in used),
        source=f"{len(used)} published steps, each system left out once: python -m benchmarks.published --fit",
    )


def coverage(residuals: Sequence[Residual]) -> float:
    """The share of rows that the intervals of the other families would have covered."""
    found = [_is_covered(r, residuals) for r in residuals]
    return sum(found) / len(found)


def _is_covered(one: Residual, residuals: Sequence[Residual]) -> bool:
    known = accuracy(residuals, one.family)
    kernels = {r.row.attention for r in residuals if r.family != one.family}
    interval = known.time(
        one.predicted_s,
        num_ranks=one.row.num_ranks,
        sequence=one.row.sequence,
        is_known=one.row.attention in kernels,
    )
    return interval.low <= one.row.measured_s <= interval.high
