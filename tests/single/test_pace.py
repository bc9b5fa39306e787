"""Who is slow, from what ranks say of their calls; and the command that reads it from a job's store."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from zgraph.cli.app import app
from zgraph.cli.watching import _read, as_rows, beat_names, top
from zgraph.errors import UsageError
from zgraph.runtime.beats import UNREADABLE, Beat, beat_key
from zgraph.runtime.circle import Circle
from zgraph.runtime.pace import Pace, Paced, slowest

NODE = "%w_full_start (all_gather_start, forward)"


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def paced(call_s: float, waits_s: float, calls: int = 50) -> Pace:
    """A rank whose calls take so long, of which it waits so long, most of it at one node."""
    clock = Clock()
    pace = Pace(clock)
    for _ in range(calls):
        pace.begin_call()
        pace.waited(NODE, 0.75 * waits_s)
        pace.waited("%other", 0.25 * waits_s)
        clock.now += call_s
    return pace


def test_means_are_of_calls_within_a_window() -> None:
    found = paced(0.125, 0.0625).last
    assert found is not None
    assert (found.call_s, found.waits_s, found.at) == pytest.approx((0.125, 0.0625, NODE))
    assert found.computes_s == pytest.approx(0.0625)
    assert found.calls == 49
    assert paced(0.1, 0.0, calls=5).last is None, "too few to tell"
    assert paced(3.0, 1.0, calls=2).last == Paced(2, 3.0, 1.0, NODE), "a call longer than the window"


@pytest.mark.parametrize(
    ("waits", "said"),
    [
        ([0.3, 0.3, 0.1, 0.3], rf"rank 2 is slowest: it computes 1.29 times .* others wait at {NODE}"),
        ([0.4, 0.4, 0.4, 0.41], rf"all ranks compute alike, and wait 40% of a step for links, most at {NODE}"),
        ([0.01, 0.01, 0.01, 0.01], ""),
        ([0.4], ""),
    ],
)
def test_who_is_slow(waits: list[float], said: str) -> None:
    found = slowest({rank: Paced(9, 1.0, wait, NODE) for rank, wait in enumerate(waits)})
    assert bool(found) == bool(said)
    for part in said.split(" .* "):
        assert part in found


def test_heartbeats_are_found_under_any_prefix() -> None:
    keys = ["/default_pg/0//zgraph/beat/1", "/default_pg/0//zgraph/beat/0", "zgraph/join/zgraph/beat/7", "x/beat/2"]
    assert beat_names(keys) == {0: "default_pg/0//zgraph/beat/0", 1: "default_pg/0//zgraph/beat/1"}
    assert beat_names(["a/zgraph/beat/0", "b/zgraph/beat/0"]) == {0: "b/zgraph/beat/0"}
    assert beat_names([]) == {}
    assert beat_names([f"w/attempt_{i}/zgraph/beat/0" for i in (9, 10, 8)]) == {0: "w/attempt_10/zgraph/beat/0"}
    assert beat_names(["zgraph/beat/" + "9" * 5000]) == {}


def test_a_job_is_watched(capsys: pytest.CaptureFixture[str]) -> None:
    tcp = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    job = f"127.0.0.1:{tcp.port}"
    with pytest.raises(UsageError, match="no heartbeats"):
        top(job, once=True)
    store = dist.PrefixStore("default_pg", tcp)
    for rank, wait in enumerate((0.3, 0.3, 0.02)):
        store.set(beat_key(rank), str(Beat(5, "has not answered", pace=paced(0.5, wait).word())))
    top(job, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["slowest"].startswith("rank 2 is slowest: it computes 2.40 times")
    assert [row["waits_at"] for row in found["ranks"]] == [NODE] * 3
    top(job, once=True)
    out = capsys.readouterr().out
    assert "3 ranks at" in out
    assert "rank 2 is slowest" in out


@pytest.mark.parametrize("job", ["host", ":1", "host:x", "host:0", "host:65536", "host:²", "host:" + "9" * 5000])
def test_a_place_that_cannot_be(job: str) -> None:
    with pytest.raises(UsageError, match="HOST:PORT"):
        top(job, once=True)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ('{"count": 1, "place": "here", "new_field": 2}', "here"),
        ('{"count": 1, "pace": {"x": 1}}', "unreadable"),
        ('{"count": 1, "pace": {"calls": 1, "call_s": "a", "waits_s": 0, "at": ""}}', "unreadable"),
        ('{"count": 1, "pace": {"calls": 1, "call_s": NaN, "waits_s": 0, "at": ""}}', "unreadable"),
        ('{"count": 1, "pace": 3}', "unreadable"),
        ('{"count": 1, "place": ["x"]}', "unreadable"),
        ('{"place": "x"}', "unreadable"),
        ("[1", "unreadable"),
        ("[" * 100_000, "unreadable"),
        ("\x80", "unreadable"),
    ],
)
def test_a_word_of_another_kind_is_shown_as_such(word: str, said: str) -> None:
    found = as_rows({0: _read(word.encode("latin-1")), 1: Beat(1)})
    assert said in found["ranks"][0]["place"]
    assert found["slowest"] == ""


def test_training_goes_on_where_a_word_cannot_be_read() -> None:
    store = dist.HashStore()
    circle = SimpleNamespace(store=store, ranks=(0, 1))
    circle._beats = lambda: Circle._beats(circle)  # type: ignore[arg-type]
    for word in ("[1", '{"count": 1, "pace": {"x": 1}}'):
        for rank in (0, 1):
            store.set(beat_key(rank), word)
        assert Circle.slowest(circle) in ("", f"of a rank, {UNREADABLE}")  # type: ignore[arg-type]


def test_ranks_that_say_nothing_are_rows() -> None:
    found = as_rows({0: Beat(3, "waits for %a in call 2", True), 1: None})
    assert [row["place"] for row in found["ranks"]] == ["waits for %a in call 2", "has never been seen"]
    assert found["slowest"] == ""
    assert any(command.callback is top for command in app.registered_commands)
