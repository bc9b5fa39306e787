"""A rank is said to wait outside of the model only if it does for long, and still does."""

from __future__ import annotations

import torch.distributed as dist

from zgraph.runtime.elsewhere import LASTING_BEATS, Seen, elsewhere

BARRIER = "torch.distributed's barrier (train.py:31)"


def looks(words: list[str], waiting: tuple[int, ...] = (0,)) -> list[bool]:
    """Whether each look of rank 0 finds that rank 1 will not come, while rank 1 tells these words."""
    store, seen, found = dist.HashStore(), Seen(), []
    for word in words:
        store.set("zgraph/elsewhere/1", word)
        found.append("rank 1 made fewer calls" in elsewhere(store, 0, (0, 1), "%x", waiting, seen))
    return found


def told(*beats: int) -> list[str]:
    return [f"{beat} {BARRIER}" for beat in beats]


def test_a_wait_that_lasts_is_one() -> None:
    assert looks(told(10, 11, 10 + LASTING_BEATS)) == [False, False, True]


def test_a_word_that_stays_behind_is_none() -> None:
    assert not any(looks(told(10, 10, 10, 10, 10, 10, 10, 10)))


def test_a_wait_that_is_over_meanwhile_is_none() -> None:
    assert not any(looks([*told(10, 11), "", *told(10 + LASTING_BEATS, 11 + LASTING_BEATS)]))


def test_nobody_is_missed_where_all_wait_in_the_model() -> None:
    assert not any(looks(told(10, 10 + LASTING_BEATS), waiting=(0, 1)))
