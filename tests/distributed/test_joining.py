"""Ranks that join: of one that dies, or does not come, all others are told."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

import zgraph
from zgraph.errors import PeerError, UsageError
from zgraph.runtime import heartbeat, rendezvous
from zgraph.runtime.beats import Beat

RANKS = 3
DIED = "rank {} died while the ranks joined. Start the job again."


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.Store:
    monkeypatch.setattr(rendezvous, "GONE_AFTER_SECONDS", 1.5)
    monkeypatch.setattr(rendezvous, "BEAT_SECONDS", 0.3)
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.3)
    return dist.HashStore()


def meet(store: dist.Store, *ranks: int, limit_s: float = 20, failing: tuple[int, ...] = ()) -> list[str]:
    """What each of these ranks, a thread each, is told; of some, connecting ends with an error."""

    def one(rank: int) -> str:
        try:
            with rendezvous._Rendezvous(store, rank, RANKS).watched(limit_s):
                if rank in failing:
                    raise RuntimeError("it took too long")
        except PeerError as error:
            return str(error)
        return "joined"

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(one, ranks))


def die(store: dist.Store, rank: int) -> None:
    """A rank with one heartbeat."""
    store.set(rendezvous.beat_key(rank), str(Beat(0)))
    rendezvous.enter(store, "came", rank)


def test_all_come(store: dist.Store) -> None:
    assert meet(store, 0, 1, 2) == ["joined"] * 3


def test_the_first_rank_dies(store: dist.Store) -> None:
    die(store, 0)
    assert meet(store, 1, 2) == [DIED.format(0)] * 2


def test_another_dies_and_a_late_rank_is_told_too(store: dist.Store) -> None:
    die(store, 2)
    assert meet(store, 0) == [DIED.format(2)]
    assert meet(store, 1) == [DIED.format(2)]


def test_one_does_not_come(store: dist.Store) -> None:
    for told in meet(store, 0, 1, limit_s=0.5):
        assert told.startswith("rank 2 of 3 did not come within 0.5 s: look whether each was started")


@pytest.mark.parametrize("dead", [True, False])
def test_connecting_fails(store: dist.Store, dead: bool) -> None:
    if dead:
        die(store, 2)
        assert meet(store, 0, 1, failing=(0, 1)) == [DIED.format(2)] * 2
    else:
        assert meet(store, 0, 1, 2, failing=(0, 1, 2)) == ["the ranks could not be joined: it took too long"] * 3


def test_those_that_have_joined_are_not_taken_for_dead(store: dist.Store) -> None:
    assert meet(store, 0, 1, 2, failing=(1, 2)) == ["joined", *["the ranks could not be joined: it took too long"] * 2]


def test_an_environment_without_a_place_to_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UsageError, match=r"MASTER_ADDR expected.*torchrun"):
        zgraph.init_distributed()
