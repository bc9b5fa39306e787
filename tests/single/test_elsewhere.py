"""A rank is said to wait outside of the model only if it does for long, and still does."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from zgraph.runtime.beats import Beat
from zgraph.runtime.elsewhere import LASTING_BEATS, Seen, elsewhere, waits_at

BARRIER = "torch.distributed's barrier (train.py:31)"


def looks(beats: list[Beat], *, waits: bool = False) -> list[bool]:
    """Whether each look of rank 0 finds that rank 1 will not come, while rank 1 sends these heartbeats."""
    seen, found = Seen(), []
    for beat in beats:
        found.append("rank 1 made fewer calls" in elsewhere(0, "%x", {1: replace(beat, waits=waits)}, seen))
    return found


def told(*beats: int) -> list[Beat]:
    return [Beat(beat, outside=BARRIER) for beat in beats]


def test_a_wait_that_lasts_is_one() -> None:
    assert looks(told(10, 11, 10 + LASTING_BEATS)) == [False, False, True]


def test_a_word_that_stays_behind_is_none() -> None:
    assert not any(looks(told(10, 10, 10, 10, 10, 10, 10, 10)))


def test_a_wait_that_is_over_meanwhile_is_none() -> None:
    assert not any(looks([*told(10, 11), Beat(12), *told(10 + LASTING_BEATS, 11 + LASTING_BEATS)]))


def test_nobody_is_missed_where_all_wait_in_the_model() -> None:
    assert not any(looks(told(10, 10 + LASTING_BEATS), waits=True))


@pytest.mark.parametrize(
    ("file", "waits"),
    [("distributed_c10d.py", True), ("tensor/_dispatch.py", False), ("checkpoint/filesystem.py", False)],
)
def test_an_op_of_a_dtensor_or_a_file_that_is_written_is_no_wait(file: str, waits: bool) -> None:
    names: dict[str, object] = {"look": lambda: waits_at(sys._getframe(1))[0]}
    exec(compile("def barrier():\n    return look()", f"/lib/torch/distributed/{file}", "exec"), names)
    place = names["barrier"]()
    assert place.startswith("torch.distributed's barrier (test_elsewhere.py:") if waits else place == ""
