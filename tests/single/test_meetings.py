"""Many ranks that compare and miss one another, a thread each over one store: what they find out, and what it costs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any

import pytest
import torch.distributed as dist

from benchmarks.control_plane import Counting
from tests.deep import DEEP
from zgraph.errors import PeerError, PlanMismatchError
from zgraph.runtime import circle, heartbeat, meetings
from zgraph.runtime.beats import Place
from zgraph.runtime.heartbeat import Heartbeat
from zgraph.runtime.meetings import Meetings
from zgraph.runtime.questions import Ears, is_there, peek, read_all

BEAT_S = 0.1
FEW, MANY = 8, 48


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hearts that beat more than ten times as fast."""
    for module in (heartbeat, circle, meetings):
        for name, seconds in (
            ("BEAT_SECONDS", BEAT_S),
            ("GONE_AFTER_SECONDS", 2.5 * BEAT_S),
            ("ASK_AFTER_SECONDS", 0.05),
            ("LINGER_SECONDS", 0.0),
            ("READ_SECONDS", 0.2),
        ):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, seconds)


class Job:
    """Ranks of one store."""

    def __init__(self, num_ranks: int, store: dist.Store, limit_s: float = 60.0) -> None:
        self.stores = [Counting(store.clone()) for _ in range(num_ranks)]
        hearts: list[Any] = [Heartbeat(s, rank) for rank, s in enumerate(self.stores)]  # type: ignore[arg-type]
        self.ranks = [Meetings(heart, tuple(range(num_ranks)), "zgraph/all/1", limit_s) for heart in hearts]

    def each(self, job: Callable[[Meetings], Any], but: Sequence[int] = ()) -> dict[int, Any]:
        """What each rank finds, or the error that it ends with."""

        def one(peers: Meetings) -> Any:
            try:
                return job(peers)
            except (PeerError, PlanMismatchError) as error:
                return error

        those = [peers for peers in self.ranks if peers.rank not in but]
        with ThreadPoolExecutor(len(those)) as pool:
            return dict(zip((peers.rank for peers in those), pool.map(one, those), strict=True))

    def asked(self) -> list[int]:
        return [store.num_asked()[0] for store in self.stores]


@pytest.fixture
def start() -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def start(num_ranks: int, limit_s: float = 60.0) -> Job:
        jobs.append(Job(num_ranks, dist.HashStore(), limit_s))
        return jobs[-1]

    yield start
    for job in jobs:
        for peers in job.ranks:
            peers.heart.over.set()
    for job in jobs:
        for peers in job.ranks:
            peers.heart.stop()


Start = Callable[..., Job]


def test_an_agreement_costs_each_rank_as_much_however_many_there_are(start: Start) -> None:
    costs = {}
    for num_ranks in (2, FEW, MANY):
        job = start(num_ranks)
        for peers in job.ranks:
            peers.heart.stop()
        before = job.asked()
        job.each(lambda peers: peers.agree("plan", "alike"))
        costs[num_ranks] = max(after - b for after, b in zip(job.asked(), before, strict=True))
    assert max(costs.values()) <= 3, costs


def test_a_rank_that_waits_asks_twice_a_beat_however_many_there_are(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "GONE_AFTER_SECONDS", 60.0)  # these hearts share one interpreter
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 4 * BEAT_S)
    rates = {}
    for num_ranks in (FEW, MANY):
        job = start(num_ranks)
        late = threading.Event()

        def come(peers: Meetings, late: threading.Event = late) -> float:
            if peers.rank == 1:
                late.wait()
            peers.agree("plan", "alike")
            return time.monotonic()

        with ThreadPoolExecutor(1) as pool:
            all_over = pool.submit(job.each, come)
            time.sleep(0.5)
            before, began = sum(job.asked()), time.monotonic()
            time.sleep(16 * BEAT_S)
            rates[num_ranks] = (sum(job.asked()) - before) / num_ranks / (time.monotonic() - began)
            came = time.monotonic()
            late.set()
            assert max(all_over.result().values()) - came < 1.0
    assert max(rates.values()) <= 2 / (4 * BEAT_S) * 1.3, rates
    assert 2 / heartbeat_s() <= 2.0


def heartbeat_s() -> float:
    """Seconds between beats as they are, not as they are here."""
    source = heartbeat.__spec__.loader.get_source(heartbeat.__name__)  # type: ignore[union-attr]
    return float(source.partition("\nBEAT_SECONDS = ")[2].splitlines()[0])


def test_words_are_exchanged_in_order(start: Start) -> None:
    random = Random(0)
    for round_ in range(20 if DEEP else 4):
        job = start(random.choice((2, 3, FEW)))
        words = [random.choice(("a", "b\n", "", "ö\0", '"' * 300)) for _ in job.ranks]
        for found in job.each(lambda peers: peers.exchange(f"words {round_}", words[peers.rank])).values():  # noqa: B023
            assert found == words


@pytest.mark.parametrize("others", [{5}, {0}, {1, 2, 6}])
def test_a_difference_is_shown_to_all(start: Start, others: set[int]) -> None:
    job = start(FEW)
    answers = job.each(lambda peers: peers.agree("plan", "one\n" + ("2" if peers.rank in others else "two")))
    different = min(r for r in range(FEW) if (r in others) != (0 in others))
    line = {rank: "2" if rank in others else "two" for rank in (0, different)}
    for said in answers.values():
        assert isinstance(said, PlanMismatchError)
        assert f"  rank 0: {line[0]}\n  rank {different}: {line[different]}\n" in str(said)
    assert set(job.each(lambda peers: peers.agree("plan", "alike")).values()) == {None}, "they are still in step"


@pytest.mark.parametrize("dead", [(3,), (2, 3, 4, 5), (1, 6)])
def test_the_dead_are_named_by_all(start: Start, dead: tuple[int, ...]) -> None:
    job = start(FEW)
    job.each(lambda peers: peers.agree("plan", "alike"))
    time.sleep(2 * BEAT_S)
    for rank in dead:
        job.ranks[rank].heart.over.set()
    began = time.monotonic()
    answers = job.each(lambda peers: peers.agree("plan", "alike"), but=dead)
    names = ", ".join(f"rank {rank}" for rank in dead)
    for said in answers.values():
        assert isinstance(said, PeerError)
        assert f"{names} of [0, 1, 2, 3, 4, 5, 6, 7] {'is' if len(dead) == 1 else 'are'} gone: rank " in str(said)
        assert "waited for the comparison of the plan" in str(said)
    assert time.monotonic() - began < 20


def test_a_failure_is_told_to_all_who_wait(start: Start) -> None:
    job = start(FEW)

    def run(peers: Meetings) -> None:
        peers.begin_call()
        if peers.rank == 2:
            peers.failed_call = peers.call
            peers.fail(ValueError("the user's own error"))
        else:
            peers.agree("plan", "alike")

    answers = job.each(run)
    assert answers.pop(2) is None
    for said in answers.values():
        assert "another rank failed: ValueError on rank 2: the user's own error" in str(said)


def test_a_failure_that_all_share_is_past_in_the_next_call(start: Start) -> None:
    job = start(FEW)

    def run(peers: Meetings) -> None:
        peers.begin_call()
        peers.fail(ValueError("odd rows"))
        peers.failed_call = peers.call
        peers.begin_call()
        peers.agree("plan", "alike")

    assert set(job.each(run).values()) == {None}


def test_a_rank_that_does_not_come_is_told_of(start: Start) -> None:
    job = start(2, limit_s=0.3)
    with pytest.raises(PeerError, match=r"rank 0 has waited for 0\.3 s: rank 0 waits for the comparison"):
        job.ranks[0].agree("plan", "alike")


def test_places_of_many_ranks_name_those_that_do_not_wait(start: Start) -> None:
    job = start(MANY)
    for peers in job.ranks:
        peers.heart.place = Place(4, "%a", peers.rank != 30, time.monotonic())
    time.sleep(4 * BEAT_S)
    said = job.ranks[0].places()
    assert said.startswith(
        "rank 30 has not answered for 0 s, last seen in call 4, after %a; of 47 others 47 wait. Look"
    )


def test_questions_do_not_wait_for_what_is_not_there() -> None:
    tcp = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for store in (dist.HashStore(), tcp, dist.PrefixStore("x", tcp)):
        assert peek(store, "a") == b""
        assert not store.check(["a"])
        store.set("a", "1")
        assert read_all(store, ["a", "b"]) == [b"1", b""]
        assert read_all(store, ["a", "a"]) == [b"1", b"1"]
        assert read_all(store, []) == []


def test_a_wait_that_is_left_ends_for_all() -> None:
    tcp = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ears = Ears(tcp)
    with ears.listen("key", "left") as first, ears.listen("key", "other") as second:
        assert not first.over.wait(0.1)
    assert {first.word(), second.word()} == {"other"}
    with ears.listen("key", "late") as third:
        assert third.over.wait(5)
    assert third.word() == "other"
    assert not any(ear.is_alive() for ear in (first, second, third))


def test_who_waits_for_a_key_is_not_woken_by_a_question_for_it() -> None:
    """torch's TCPStore wakes all who wait for a key when a comparison with it fails, though it is not there."""
    tcp = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with Ears(tcp).listen("ruling", "left") as ear:
        time.sleep(0.1)
        peek(tcp, "ruling")
        assert not is_there(tcp, "ruling")
        assert not ear.over.wait(0.2)
        tcp.set("ruling", "same")
        assert ear.over.wait(5)
    assert ear.word() == "same"
