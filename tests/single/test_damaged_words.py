"""Words of the job's store that no rank has written: they are an error that says so, or are passed over."""

from __future__ import annotations

import json
from collections.abc import Iterator
from random import Random

import pytest
import torch.distributed as dist

from tests.deep import DEEP
from zgraph.errors import PeerError
from zgraph.runtime.alarms import COUNT, Alarm, Alarms, raise_alarm
from zgraph.runtime.beats import UNREADABLE, Beat, beat_key
from zgraph.runtime.drift import Wait
from zgraph.runtime.heartbeat import Heartbeat
from zgraph.runtime.journal import Entry, Journal, parse_lines, print_lines
from zgraph.runtime.meetings import Meetings

NAME = "zgraph/0_1/1"
TRIES = 3000 if DEEP else 300


def damaged(draw: Random, word: bytes) -> bytes:
    """A word with a few bytes changed, left out or added."""
    held = bytearray(word)
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(held) + 1)
        held[at : at + draw.randint(0, 2)] = draw.randbytes(draw.randint(0, 2))
    return bytes(held)


def waiting() -> Wait:
    """A wait in the fourth collective of a lane."""
    journal = Journal("lane")
    journal.enter("all-reduce", [8], None)
    return Wait(dist.HashStore(), 0, "%a", journal, 4, "", "m/2")


def test_a_damaged_heartbeat_is_one_that_says_so() -> None:
    draw, ours = Random(0), waiting()
    word = str(Beat(7, "waits for %a", True, "", waiting().word(), {"calls": 1})).encode()
    assert Beat.read(word) == Beat.parse(word)
    assert Beat.read(b"") is None
    num_unreadable = 0
    for _ in range(TRIES):
        found = Beat.read(damaged(draw, word) or b"x")
        assert found is not None
        num_unreadable += found.place == UNREADABLE
        ours.drifted(1, found)
    assert num_unreadable > TRIES / 4
    one, other = Beat.read(b"\xff1"), Beat.read(b"\xff2")
    assert one is not None
    assert other is not None
    assert one.count != other.count, "a rank whose words are unreadable still lives"


@pytest.mark.parametrize(
    "wait", [{"serial": 1}, {**waiting().word(), "last": [1]}, {**waiting().word(), "begun": {"a": "b"}}]
)
def test_a_wait_of_another_kind_is_no_heartbeat(wait: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="another wait"):
        Beat.parse(json.dumps({"count": 3, "wait": wait}).encode())


def test_a_damaged_alarm_is_passed_over() -> None:
    store, draw = dist.HashStore(), Random(1)
    alarms = Alarms(store)
    raise_alarm(store, Alarm("silent", "", 1, '{"1": 4}'))
    for word in (b"\xff", b"[]", b"7", b'{"kind": "left"}', b"[" * 10_000, b'{"kind": 1}'):
        store.set(f"zgraph/alarm/{store.add(COUNT, 1)}", word)
    raise_alarm(store, Alarm("left", "", 0, "ended", {"lane": 3}))
    assert [(a.kind, a.lasts) for a in alarms.new()] == [("silent", {1: 4}), ("left", {})]
    whole = json.dumps({"kind": "failed", "scope": "m/3", "rank": 1, "text": '{"1": 4}', "begun": {"l": 1}}).encode()
    for _ in range(TRIES):
        found = Alarm.parse(damaged(draw, whole))
        if found is not None:
            _ = found.lasts, found.failed_call


def test_lines_of_a_journal_that_are_none_are_left_out() -> None:
    lines = [Entry(1, 7, "a b"), Entry(2, 8, "c")]
    assert parse_lines(print_lines(lines) + "\nx\n3 four d\n5 6\n² 1 e") == lines
    draw = Random(2)
    for _ in range(TRIES):
        parse_lines(damaged(draw, print_lines(lines).encode()).decode(errors="replace"))


@pytest.fixture
def peers() -> Iterator[Meetings]:
    """The first of two ranks, of which the other never comes."""
    heart = Heartbeat(dist.HashStore(), 0)
    yield Meetings(heart, (0, 1), NAME, 20.0)
    heart.stop()


@pytest.mark.parametrize("ruling", [b"\xff", b"{", b"[]", b"7", b'[["a"], [0]]', b'[["a"], [0, 1]]', b"[" * 100_000])
def test_a_damaged_ruling_is_an_error_that_names_the_store(peers: Meetings, ruling: bytes) -> None:
    peers.store.set(f"{NAME}/0/names/ruling", ruling)
    with pytest.raises(PeerError, match="a word in the job's key-value store is none"):
        peers.exchange("names", "me")


def test_values_that_are_none(peers: Meetings) -> None:
    peers.store.set(f"{NAME}/0/times/ruling", json.dumps([["3", "{"], [0, 1]]))
    with pytest.raises(PeerError, match="a word in the job's key-value store is none"):
        peers.exchange_values("times", 3)
    peers.store.set(f"{NAME}/0/sizes/ruling", json.dumps([["3", "[4]"], [0, 1]]))
    assert peers.exchange_values("sizes", 3) == [3, [4]]


def test_a_number_that_is_none(peers: Meetings) -> None:
    peers.store.set(f"{NAME}/0/short/ruling", "many")
    with pytest.raises(PeerError, match="a word in the job's key-value store is none"):
        peers.smallest("short", "here", 3, 1.0)


def test_a_rank_looks_on_whatever_the_store_says(peers: Meetings) -> None:
    peers.store.set(beat_key(1), b"\xff")
    for scope, kind in ((f"{NAME}/x", "failed"), ("", "silent"), (f"{NAME}/", "failed"), (f"{NAME}/²", "failed")):
        raise_alarm(peers.store, Alarm(kind, scope, 1, "\ud800"))
    peers.store.set(f"{NAME}/0/failed", b"\xff")
    peers.heart.listen()
    peers.raise_failure()
    peers.silent()
    assert peers.heart.beat_of(1) is not None
    assert UNREADABLE in peers.places()
    with pytest.raises(PeerError, match="another rank failed"):
        peers.begin_call()
