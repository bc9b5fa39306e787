"""Intervals: their width, their digits, and what is a tie."""

import math

import pytest

from zgraph.cost import Accuracy, Interval, bytes_text, hardware, time_text
from zgraph.cost.hardware import as_toml, known, load

KNOWN = Accuracy(time_low=0.9, time_high=1.2, memory_low=0.95, memory_high=1.1, max_ranks=64, max_sequence=4096)


def test_an_interval_is_wider_beyond_what_was_published():
    inside = KNOWN.time(10.0, num_ranks=64, sequence=4096)
    assert (inside.low, inside.high) == pytest.approx((9, 12))
    more = KNOWN.time(10.0, num_ranks=256)
    assert (more.low, more.high) == pytest.approx((10 * 0.9**1.3, 10 * 1.2**1.3))
    assert KNOWN.time(10.0, sequence=8192).high == pytest.approx(10 * 1.2**1.15)
    assert KNOWN.time(10.0, is_known=False).high == pytest.approx(10 * 1.2**1.25)
    assert KNOWN.memory(100.0).high == pytest.approx(110)


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (Interval(3.2, 3.6123, 4.1), "3.6 (80 %: 3.2 to 4.1)"),
        (Interval(30.0, 36.123, 42.0), "36 (80 %: 30 to 42)"),
        (Interval(3599.0, 3612.3, 3620.0), "3,612 (80 %: 3,599 to 3,620)"),
        (Interval(0.9990, 1.0, 1.0010), "1.000 (80 %: 0.999 to 1.001)"),
        (Interval(2.0, 2.0, 2.0), "2.00"),
        (Interval(0.0, 0.0, 0.0), "0.00"),
    ],
)
def test_no_digit_is_printed_that_is_not_known(interval, text):
    assert interval.text() == text


def test_units():
    assert time_text(Interval(2e6, 2.5e6, 3.1e6)) == "2.5 s (80 %: 2.0 to 3.1)"
    assert time_text(Interval(2e3, 2.5e3, 3.1e3)) == "2.5 ms (80 %: 2.0 to 3.1)"
    assert bytes_text(Interval(2.0 * 2**30, 2.5 * 2**30, 3.1 * 2**30)) == "2.5 GiB (80 %: 2.0 to 3.1)"
    assert bytes_text(Interval(10, 12, 15)) == "12 B (80 %: 10 to 15)"


def test_ties():
    first, second = Interval(9, 10, 12), Interval(10, 11, 13)
    assert first.is_tied(second)
    assert second.is_tied(first)
    assert not first.is_tied(Interval(18, 20, 24))


@pytest.mark.parametrize("name", known())
def test_profiles_are_written_and_read_back_with_their_constants(name, tmp_path):
    profile = hardware(name)
    path = tmp_path / "copy.toml"
    path.write_text(as_toml(profile))
    assert load(path) == profile
    error = profile.error
    assert error.time_low < 1 < error.time_high
    assert math.isfinite(error.time(1.0, num_ranks=10**6, sequence=10**7).high)
