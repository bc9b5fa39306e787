"""Intervals from what was left out, and how often they would have been right."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.published.fit import row_weight
from zgraph.cost.accuracy import LEVEL


@dataclass(frozen=True)
class Residual:
    """Measured over predicted of a row whose family the constants have not seen."""

    name: str
    family: str
    measured_s: float
    predicted_s: float

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted_s / self.measured_s - 1

    @property
    def log_ratio(self) -> float:
        return math.log(self.measured_s / self.predicted_s)


def bounds(residuals: Sequence[Residual], left_out: str = "") -> tuple[float, float]:
    """Quantiles of measured over predicted between which `LEVEL` of what others measured lies.

    A family counts as its rows do in the fit. The share beyond each bound is smaller by what one family more would
    be of all of them, as split conformal intervals take the point to come into account.

    Args:
        residuals: of left-out rows.
        left_out: a family that the bounds are to be tried on.
    """
    counts = Counter(r.family for r in residuals)
    used = sorted((r for r in residuals if r.family != left_out), key=lambda r: r.log_ratio)
    weights = [1 / row_weight(counts[r.family]) for r in used]
    total = sum(weights)
    tail = (1 - LEVEL) / 2 * total / (total + total / max(len(counts) - bool(left_out), 1) ** 2)
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


def coverage(residuals: Sequence[Residual]) -> float:
    """The share of rows that bounds made of the other families would have covered."""
    found = {family: bounds(residuals, family) for family in {r.family for r in residuals}}
    covered = [found[r.family][0] <= math.exp(r.log_ratio) <= found[r.family][1] for r in residuals]
    return sum(covered) / len(covered)
