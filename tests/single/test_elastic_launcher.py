"""The launcher of an elastic job at its end, and what it leaves running: nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest

from benchmarks.elastic import Campaign, Faulty
from zgraph.cli import elastic_launching as elastic
from zgraph.cli.elastic_launching import Gang, Launcher, Start, code_of, ranks_here
from zgraph.runtime.generations import Generation
from zgraph.runtime.pulse import Member, beat_key


def launched(script: str, most: int, patience_s: float = 20.0, joins: bool = False) -> Launcher:
    """A launcher of replicas that run a script of the shell; where it joins, the first life of each has when it is
    started.
    """
    begin: Start = ranks_here(["sh", "-c", script], 1)

    def start(replica: int, variables: dict[str, str]) -> list[subprocess.Popen[bytes]]:
        members = tuple(Member(at, 1) for at in range(most))
        if joins and launcher._store.add(f"lives/{replica}", 1) == 1:
            launcher._store.set("generation/1", str(Generation(1, members, members[1:], members[0], 0, 2, "")))
        return begin(replica, variables)

    launcher = Launcher(start, "127.0.0.1", 1, most, 3, "again", patience_s=patience_s)
    return launcher


FIRST = 'test "$ZGRAPH_ELASTIC_REPLICA" = 0 && exit 0; '


def test_who_is_late_at_the_end_is_told_and_not_lost(capfd: pytest.CaptureFixture[str]) -> None:
    assert launched(FIRST + "sleep 60", 2, patience_s=0.3).run() == 1
    assert "replicas [1] still ran" in (said := capfd.readouterr().err)
    assert "may be missing. Raise ZGRAPH_TIMEOUT" in said
    assert launched(FIRST + "sleep 0.5", 2).run() == 0
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("joins", "code"), [(True, 7), (False, 0)])
def test_who_fails_behind_the_end_is_not_started_again(
    capfd: pytest.CaptureFixture[str], joins: bool, code: int
) -> None:
    """One that has trained has maybe not saved; one that only came too late has nothing to save."""
    assert launched(FIRST + "sleep 0.5; exit 7", 2, joins=joins).run() == code
    said = capfd.readouterr().err
    assert "replica 1: it ended with exit code 7; it is not started again" in said
    assert "it is started again" not in said
    assert ("what replica 1 was to write at the end may be missing" in said) == joins


def test_who_dies_behind_the_last_step_is_missed_though_nobody_had_ended(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is started again, and has not joined when the other ends: it is ended at once, and what it wrote is missed."""
    of_first = (
        f'test "$ZGRAPH_ELASTIC_REPLICA" = 0 && {{ while ! test -e {tmp_path}/again; do sleep 0.05; done; exit 0; }}; '
    )
    script = (
        f"{of_first} test -e {tmp_path}/died && {{ touch {tmp_path}/again; sleep 60; }}; touch {tmp_path}/died; exit 7"
    )
    began = time.monotonic()
    assert launched(script, 2, patience_s=30, joins=True).run() == 7
    assert time.monotonic() - began < 20
    said = capfd.readouterr().err
    assert "replica 1: it ended with exit code 7; it is started again" in said
    assert "replica 1 is ended: the training ended before it could join" in said
    assert "what replica 1 was to write at the end may be missing" in said


def test_who_could_not_join_before_the_end_makes_no_job_fail(capfd: pytest.CaptureFixture[str]) -> None:
    launcher = launched(FIRST + "sleep 60", 2, patience_s=30)
    launcher._store.set("generation/1", str(Generation(1, (Member(0, 1),), (), Member(0, 1), 0, 1, "")))
    began = time.monotonic()
    assert launcher.run() == 0
    assert time.monotonic() - began < 20
    assert "replica 1 is ended: the training ended before it could join" in capfd.readouterr().err


@pytest.mark.parametrize(("last_s", "is_told"), [(5.0, True), (-60.0, False)])
def test_last_words_are_those_of_the_end(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, last_s: float, is_told: bool
) -> None:
    monkeypatch.setattr(elastic, "LAST_S", last_s)
    launcher = launched("echo no luck; echo '  frame #3: start'; exit 3", 1)
    launcher._max_restarts = 0
    assert launcher.run() == 3
    said = capfd.readouterr().err
    assert ('having said "no luck"' in said) == is_told
    assert "frame" not in said


@pytest.mark.parametrize(("code", "said"), [([1], "exit code 1"), ([], "does not end")])
def test_faults_after_which_the_job_fails_are_told(tmp_path: Path, code: list[int], said: str) -> None:
    campaign = Campaign([], tmp_path, [], 1, 0, "127.0.0.1")
    campaign.code = code
    rows: dict[Path, list[list[Any]]] = {tmp_path / "0-0-1.jsonl": [[3]]}
    seen = patch.multiple(campaign, rows=lambda: rows, thread=Mock())
    with seen, pytest.raises(Faulty, match=said):
        campaign.finish()
    assert (tmp_path / "stop").read_text() == "8"


def processes_of(group: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(words[2]) == group and words[0] != "Z":
            found.append(int(path.parent.name))
    return found


def until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not is_so() and time.monotonic() < end:
        time.sleep(0.02)
    assert is_so()


def test_what_ignores_the_signal_is_killed_with_its_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic, "GRACE_S", 0.3)
    launcher = launched("trap '' TERM; sleep 60 & sleep 60", 1)
    launcher._look(launcher.gangs[0], time.monotonic())
    (process,) = launcher.gangs[0].processes
    until(lambda: len(processes_of(process.pid)) == 3)
    launcher._end_all()
    assert process.returncode == -signal.SIGKILL
    until(lambda: not processes_of(process.pid))


def test_children_of_one_that_has_ended_are_ended_too() -> None:
    launcher = launched("trap '' TERM; sleep 60 & exit 0", 1)
    launcher._look(launcher.gangs[0], time.monotonic())
    (process,) = launcher.gangs[0].processes
    until(lambda: code_of(process) == 0)
    assert process.returncode is None, "its number is not given to another yet"
    assert len(processes_of(process.pid)) == 1
    launcher._end_all()
    until(lambda: not processes_of(process.pid))


def test_a_number_that_was_given_back_is_not_signalled(monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen(["true"], start_new_session=True)
    gang = Gang(0, [process])
    until(lambda: code_of(process) == 0)
    gang.kill()
    assert process.returncode == 0
    monkeypatch.setattr(os, "killpg", lambda *_: pytest.fail("the number is another's"))
    gang.kill()
    gang.end(signal.SIGTERM)
    assert code_of(process) == 0


def test_a_rank_that_has_ended_is_not_taken_for_a_silent_one() -> None:
    launcher = launched("exit 0", 1)
    gang = launcher.gangs[0]
    gang.processes = [subprocess.Popen(words, start_new_session=True) for words in (["true"], ["sleep", "60"])]
    try:
        until(lambda: code_of(gang.processes[0]) == 0)
        launcher._store.add("lives/0", 1)
        now = time.monotonic()
        for shard in range(2):
            launcher._store.set(beat_key(Member(0, 1), shard), "3 7 0 1")
        assert launcher._silence(gang, now) is None
        launcher._store.set(beat_key(Member(0, 1), 1), "9 7 0 1")
        assert launcher._silence(gang, now + elastic.SILENT_S + 2) is None, "the first has ended, the second is heard"
        found = launcher._silence(gang, now + 2 * elastic.SILENT_S + 4)
        assert found == ("rank 1 of it was silent for 20 s, and it was killed", 1)
    finally:
        gang.kill()
