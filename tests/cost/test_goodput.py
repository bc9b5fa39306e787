"""Goodput of jobs that fail, beside jobs that are played out."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zgraph.cost.goodput import Failures, best_interval_s, goodput
from zgraph.errors import UsageError


def played(failures: Failures, interval_s: float, num_intervals: int) -> tuple[float, float]:
    """The shares of useful time and of restarts of one job, with failures drawn."""
    dice = random.Random(0)
    now, down = 0.0, 0.0
    left = dice.expovariate(1 / failures.every_s)
    for _ in range(num_intervals):
        while left < (needed := interval_s + failures.checkpoint_s):
            now += left
            while (left := dice.expovariate(1 / failures.every_s)) < failures.restart_s:
                now, down = now + left, down + left
            left -= failures.restart_s
            now, down = now + failures.restart_s, down + failures.restart_s
        now, left = now + needed, left - needed
    return num_intervals * interval_s / now, down / now


@pytest.mark.parametrize(("every", "save", "restart", "interval"), [(1e4, 30, 300, 1200), (3e3, 100, 600, 900)])
def test_it_is_what_a_long_job_has(every: float, save: float, restart: float, interval: float) -> None:
    failures = Failures(every, save, restart)
    found = goodput(failures, interval)
    useful, down = played(failures, interval, 40_000)
    assert found.useful == pytest.approx(useful, rel=0.01)
    assert found.restarts == pytest.approx(down, rel=0.05)
    assert found.useful + found.checkpoints + found.restarts + found.lost == pytest.approx(1)


def test_nothing_is_lost_where_nothing_fails() -> None:
    found = goodput(Failures(1e15, 10, 100), 990)
    assert (found.useful, found.checkpoints) == pytest.approx((0.99, 0.01))
    assert found.lost + found.restarts < 1e-9


@given(st.floats(1e3, 1e6), st.floats(1, 100), st.floats(0, 600))
def test_no_interval_is_better_than_the_best(every: float, save: float, restart: float) -> None:
    failures = Failures(every, save, restart)
    best = best_interval_s(failures, 0.001)
    assert best == pytest.approx(math.sqrt(2 * save * every), rel=0.7)  # Young, 1974
    for factor in (0.5, 0.9, 1.1, 2.0):
        assert goodput(failures, factor * best).useful <= goodput(failures, best).useful + 1e-9


def test_a_checkpoint_is_saved_after_a_step_at_the_earliest() -> None:
    assert best_interval_s(Failures(100.0), 2.5) == 2.5
    assert best_interval_s(Failures(1.0, 0.001), 60.0) == 60.0


@pytest.mark.parametrize("times", [(0.0, 1.0, 1.0), (math.inf, 1.0, 1.0), (1.0, -1.0, 1.0), (1.0, 1.0, math.nan)])
def test_times_that_mean_nothing_are_refused(times: tuple[float, float, float]) -> None:
    with pytest.raises(UsageError):
        Failures(*times)


def test_what_never_gets_there_is_refused() -> None:
    with pytest.raises(UsageError, match="save more often"):
        goodput(Failures(10.0, 1.0, 1.0), 1e5)
    with pytest.raises(UsageError, match="never get"):
        best_interval_s(Failures(10.0, 10_000.0), 1.0)
    with pytest.raises(UsageError, match="above 0"):
        goodput(Failures(10.0), 0.0)
