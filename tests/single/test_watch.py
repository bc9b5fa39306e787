"""Watch over a device that does not go on: what two ranks of one store tell each other, beat by beat."""

from __future__ import annotations

import logging
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from zgraph.bridge import private_runtime
from zgraph.errors import PeerError, PlanMismatchError
from zgraph.runtime import circle
from zgraph.runtime import heartbeat as heart
from zgraph.runtime import watch as watching
from zgraph.runtime.alarms import HOLE_LOOKS, MOST_AT_ONCE, Alarm, Alarms, raise_alarm
from zgraph.runtime.beats import Beat, Place, beat_key
from zgraph.runtime.drift import Wait
from zgraph.runtime.heartbeat import Heartbeat
from zgraph.runtime.journal import Journal, Moved, begun, keep
from zgraph.runtime.meetings import Meetings
from zgraph.runtime.watch import DeviceMarks, Mark, Watch

NAME = "zgraph/0_1/1"


class Counted(dist.HashStore):
    """A store that counts what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()

    def check(self, keys: list[str]) -> bool:
        self.asked["check"] += 1
        return super().check(keys)

    def add(self, key: str, amount: int) -> int:
        self.asked["add"] += 1
        return super().add(key, amount)

    def get(self, key: str) -> bytes:
        self.asked["get"] += 1
        return super().get(key)

    def set(self, key: str, value: str) -> None:
        self.asked["set"] += 1
        super().set(key, value)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        self.asked["compare_set"] += 1
        return super().compare_set(key, expected, desired)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.asked["multi_get"] += 1
        return super().multi_get(keys)


class Heart(Heartbeat):
    """One that beats when it is told to."""

    def start(self) -> None: ...

    def stop(self) -> None: ...


class Rank:
    """One of two ranks, whose device has come to the end of its work, or waits."""

    def __init__(self, store: dist.Store, rank: int) -> None:
        self.heart = Heart(store, rank)
        peers = self.peers = Meetings(self.heart, (0, 1), NAME, 600.0)
        peers.call = 3
        self.heart.place = Place(3, "", False, 0.0)
        peers.journal = self.journal = Journal("zgraph/group/0_1", call=3)
        self.is_passed, self.aborted = False, list[int]()
        self.num_marks = self.num_beats = 0
        self.watch = Watch(peers, self.journal, self, self.aborted.append)
        self.heart.add(self.watch)

    def enter(self) -> None: ...

    def __call__(self, number: int) -> Mark:
        self.num_marks += 1
        return Mark(number, time.monotonic() - 10, lambda: self.is_passed)

    def begin(self, *names: str) -> None:
        for name in names:
            self.journal.enter("all-gather", (), Moved(name.encode(), f"%{name}"))

    def beat(self, times: int = 1) -> None:
        for _ in range(times):
            self.num_beats += 1
            self.heart._beat(self.num_beats)

    def ended(self) -> Any:
        """What the main thread raises, once the communicators are aborted."""
        until = time.monotonic() + 5
        while not self.aborted and time.monotonic() < until:
            time.sleep(0.01)
        with pytest.raises((PeerError, PlanMismatchError)) as caught:
            self.peers.raise_doom()
        return caught.value


@pytest.fixture
def store() -> Counted:
    return Counted()


@pytest.fixture
def pair(store: Counted) -> tuple[Rank, Rank]:
    return Rank(store, 0), Rank(store, 1)


def test_all_is_well(store: Counted, pair: tuple[Rank, Rank]) -> None:
    first, _ = pair
    first.is_passed = True
    first.begin("a", "b")
    first.beat(20)
    assert store.asked == {"set": 20, "multi_get": 20, "compare_set": 1, "add": 1}
    assert first.peers.doom is None
    assert first.watch.stuck_at is None


def test_other_programs(pair: tuple[Rank, Rank]) -> None:
    first, second = pair
    first.begin("a", "b", "c")
    second.begin("a", "c", "b", "d")
    for _ in range(4):
        first.beat()
        second.beat()
    for rank in pair:
        error = rank.ended()
        assert isinstance(error, PlanMismatchError)
        assert "rank 0 is at %b in call 3, rank 1 is at %c in call 3" in str(error)
        assert rank.aborted


def test_long_computing_is_no_drift(pair: tuple[Rank, Rank]) -> None:
    first, second = pair
    first.begin("a", "b", "c")
    second.begin("a", "b")
    for _ in range(4):
        first.beat()
        second.beat()
    assert first.peers.doom is None
    assert second.peers.doom is None
    assert str(first.watch.stuck_at) == "waits for %c in call 3"


def test_a_rank_that_failed(pair: tuple[Rank, Rank], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "GRACE_SECONDS", -1.0)
    first, second = pair
    first.begin("a", "b")
    second.begin("a")
    second.peers.fail(ValueError("no more memory"))
    second.peers.failed_call = 3
    first.beat()
    second.beat()
    assert "another rank failed: ValueError on rank 1: no more memory" in str(first.ended())
    assert first.aborted == [1]
    assert second.peers.doom is None


def test_all_failed_alike(pair: tuple[Rank, Rank], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = pair
    first.begin("a", "b")
    second.begin("a")
    second.peers.fail(ValueError("odd rows"))
    first.beat()
    assert first.peers.doom is None, "it may yet fail likewise"
    first.peers.failed_call = 3
    monkeypatch.setattr(watching, "GRACE_SECONDS", -1.0)
    first.beat(3)
    assert first.peers.doom is None


@pytest.mark.parametrize(("begun", "ends"), [(1, True), (2, False)])
def test_a_rank_that_ended(store: Counted, pair: tuple[Rank, Rank], begun: int, ends: bool) -> None:
    """It is missed by those who have begun what it never will."""
    first, _ = pair
    first.begin("a", "b")
    raise_alarm(store, Alarm("left", "", 1, "ended by OSError: no such file", {"zgraph/group/0_1": begun}))
    first.beat()
    assert (first.peers.doom is not None) == ends
    if ends:
        text = "rank 1 ended by OSError: no such file, while rank 0 waits for %b in call 3"
        assert text in str(first.ended())


def test_a_rank_without_a_heartbeat(store: Counted, pair: tuple[Rank, Rank], monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = pair
    first.begin("a")
    store.set(beat_key(1), str(Beat(7, "somewhere")))
    first.beat(2)
    assert first.peers.doom is None
    monkeypatch.setattr(heart, "GONE_AFTER_SECONDS", -1.0)
    monkeypatch.setattr(heart, "BEAT_SECONDS", -1.0)
    monkeypatch.setattr(watching, "PATIENCE_SECONDS", -1.0)
    first.beat(2)
    assert "rank 1 is gone, while rank 0 waits for %a" in str(first.ended())


def test_a_rank_that_was_silent_and_beats_again_is_not_gone(
    store: Counted, pair: tuple[Rank, Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = pair
    first.begin("a")
    store.set(beat_key(1), str(Beat(7)))
    first.beat(2)
    with monkeypatch.context() as patch:
        patch.setattr(heart, "GONE_AFTER_SECONDS", -1.0)
        patch.setattr(heart, "BEAT_SECONDS", -1.0)
        first.beat(2)
    assert [a.kind for a in first.heart.alarms] == ["silent"]
    store.set(beat_key(1), str(Beat(8)))
    monkeypatch.setattr(watching, "PATIENCE_SECONDS", -1.0)
    first.beat(2)
    assert first.peers.doom is None


def test_the_store_is_gone(pair: tuple[Rank, Rank]) -> None:
    first, _ = pair
    first.begin("a")
    first.watch.look_alone()
    first.watch.look_alone()
    assert "key-value store" in str(first.ended())


class Looker:
    """Someone who looks on, and may fail."""

    stuck_at, wait, reason = None, None, ""

    def __init__(self, seen: Counter[str]) -> None:
        self.seen = seen

    def look(self, alarms: list[Alarm]) -> None:
        self.seen["looked"] += 1
        raise RuntimeError("deque mutated during iteration")

    def look_alone(self) -> None:
        self.seen["alone"] += 1


class Ending(dist.HashStore):
    """A store that ends with its process."""

    is_gone = False

    def set(self, key: str, value: str) -> None:
        if self.is_gone:
            raise RuntimeError("Broken pipe")
        super().set(key, value)


def until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_an_error_in_looking_is_no_end_of_the_store(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(heart, "BEAT_SECONDS", 0.01)
    store, seen = Ending(), Counter[str]()
    looker = Looker(seen)
    heartbeat = Heartbeat(store, 0)
    try:
        heartbeat.add(looker)
        with caplog.at_level(logging.WARNING, "zgraph"):
            until(lambda: seen["looked"] > 5)
        assert seen["alone"] == 0
        beat = Beat.parse(store.get(beat_key(0)))
        assert beat is not None
        assert beat.count > 3
        assert len([r for r in caplog.records if "could not look on" in r.getMessage()]) == 1
        store.is_gone = True
        until(lambda: seen["alone"] > 2)
        gone = weakref.ref(looker)
        del looker
        until(lambda: gone() is None)
        until(lambda: not heartbeat.is_alive())
    finally:
        heartbeat.stop()


def test_a_journal_is_read_while_it_is_written() -> None:
    journal = Journal("zgraph/test")
    keep(journal)
    is_over = threading.Event()

    def write() -> None:
        others = []
        while not is_over.is_set():
            journal.enter("all-gather", (), Moved(b"a", "%a"))
            others = [Journal(f"zgraph/test/{journal.number}/{i}") for i in range(8)]
            for other in others:
                keep(other)

    thread = threading.Thread(target=write)
    thread.start()
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        wait = Wait(dist.HashStore(), 0, "here", journal, 1)
        for _ in range(50):
            wait.tell()
            wait.word()
            assert begun()["zgraph/test"] <= journal.number
    finally:
        sys.setswitchinterval(before)
        is_over.set()
        thread.join()


def test_many_alarms_are_read_in_turn(store: Counted) -> None:
    for rank in range(MOST_AT_ONCE + 3):
        raise_alarm(store, Alarm("left", "", rank, "ended"))
    alarms = Alarms(store)
    assert [a.rank for a in alarms.new()] == list(range(MOST_AT_ONCE))
    assert [a.rank for a in alarms.new()] == [MOST_AT_ONCE + i for i in range(3)]
    assert alarms.new() == []


def test_a_number_that_stays_empty_hides_no_alarms(store: Counted) -> None:
    alarms = Alarms(store)
    store.add("zgraph/alarms", 1)  # and its process was killed
    raise_alarm(store, Alarm("left", "", 1, "ended"))
    store.add("zgraph/alarms", 1)
    raise_alarm(store, Alarm("left", "", 2, "ended"))
    found = [[a.rank for a in alarms.new()] for _ in range(3 * HOLE_LOOKS)]
    assert [ranks for ranks in found if ranks] == [[1], [2]]
    assert not any(found[:HOLE_LOOKS]), "its process may yet fill it"


def test_waits_that_are_not_the_models(pair: tuple[Rank, Rank]) -> None:
    """A collective of the script's own lies behind the last mark: no other mark is made until the model goes on."""
    first, _ = pair
    first.begin("a")
    first.is_passed = True
    first.beat(5)
    assert first.num_marks == 1
    first.is_passed = False
    first.heart.place = Place(4, "", False, 1.0)  # a call begins
    first.beat(5)
    assert first.num_marks == 1
    assert first.watch.stuck_at is None
    first.heart.place = Place(4, "%a", False, 2.0)  # its stream waits for a collective begun before
    first.beat(2)
    assert first.num_marks == 2
    assert first.watch.stuck_at is not None
    first.is_passed = True
    first.begin("b")
    first.beat(2)
    assert first.num_marks == 3


def test_a_patient_wait_ends(pair: tuple[Rank, Rank], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(circle, "LINGER_SECONDS", 0.0)
    peers = pair[0].peers
    peers.limit_s = 0.6
    began = time.monotonic()
    with pytest.raises(PeerError, match=r"rank 0 has waited for 1\.2 s"):
        peers.exchange("times", "mine", num_limits=2)
    assert time.monotonic() - began > 1.2


def test_marks_of_a_device_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        def record(self, stream: Any) -> None:
            self.stream = stream

        def query(self) -> bool:
            raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    marks = DeviceMarks(torch.device("cuda", 1))
    assert marks(5) is None, "nothing was queued yet"
    marks.enter()
    mark = marks(5)
    assert mark is not None
    assert mark.number == 5
    assert mark.is_passed(), "the main thread meets the error itself"


def test_groups_are_aborted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Group:
        def __init__(self, name: str) -> None:
            self.name = name

        def _get_backend(self, device: torch.device) -> Any:
            return SimpleNamespace(_group_start=lambda: done.append("("), _group_end=lambda: done.append(")"))

        def abort(self) -> None:
            done.append(self.name)

    whole, others = Group("whole"), Group("others")
    world = SimpleNamespace(
        pg_map={whole: None, others: None}, pg_group_ranks={whole: {0: 0, 1: 1, 2: 2}, others: {0: 0, 2: 1}}
    )
    monkeypatch.setattr(dist.distributed_c10d, "_world", world)
    private_runtime.abort_groups(1)
    assert done == ["(", "whole", ")"]
