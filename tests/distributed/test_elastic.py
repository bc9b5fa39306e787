"""Replicas that die and join while the others go on: no step is lost, and all are equal to the last bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import zgraph
from benchmarks import elastic
from benchmarks.errors import HostsUnavailable
from tests.deep import deep
from zgraph.cli.elastic_launching import Launcher, ranks_here
from zgraph.environment import elastic_place, read_range
from zgraph.errors import StateDictError, UsageError
from zgraph.optim.twins import Given, pack, unpack
from zgraph.runtime.generations import Generation
from zgraph.runtime.pulse import Member, Place

from .elastic_job import Job, Plan, reference


@pytest.fixture
def job(request: pytest.FixtureRequest) -> Iterator[Job]:
    made = Job(*getattr(request, "param", (1, 2)))
    yield made
    made.end()


@pytest.mark.parametrize(
    ("fault", "num_ranks", "stage"),
    [
        (signal.SIGKILL, 1, 3),
        (signal.SIGSTOP, 1, 3),
        deep(signal.SIGKILL, 2, 3),
        deep(signal.SIGSTOP, 2, 1),
    ],
)
def test_a_replica_that_is_lost_comes_back(job: Job, fault: signal.Signals, num_ranks: int, stage: int) -> None:
    plan = Plan(steps=80 * num_ranks, num_ranks=num_ranks, stage=stage, nap_s=0.05)
    job.start(0, plan)
    job.start(1, plan._replace(faults=((num_ranks - 1, 4, fault),)))
    job.listen((0, 1, 0), "step", 8)
    job.end_replica(1, 1)
    job.start(1, plan)
    job.listen()
    survivor, joined = job.steps(0, 1), job.steps(1, 2)
    assert [step.number for step in survivor] == [*range(plan.steps)], "no step of the survivor is lost"
    assert [step.replicas for step in survivor[:4]] == [(0, 1)] * 4
    assert survivor[4].replicas == (0,), "the step in which it was lost is taken without it"
    begin = joined[0].number
    assert 4 < begin < plan.steps
    assert job.store.num_keys() < plan.steps / num_ranks, "what a step leaves in the store is removed"
    for rank in range(num_ranks):
        ours, theirs = job.steps(0, 1, rank), job.steps(1, 2, rank)
        assert [(s.shards, s.states) for s in theirs] == [(s.shards, s.states) for s in ours[begin:]]
    if num_ranks == 1:
        expected = reference([step.replicas for step in survivor], plan)
        assert survivor == expected, "losses, shards and states are those of a run without these micro-batches"


@pytest.mark.parametrize("stage", [deep(2)])
def test_an_engine_reduces_before_it_clips(job: Job, stage: int) -> None:
    plan = Plan(steps=200, engine=True, stage=stage, nap_s=0.1)
    job.start(0, plan)
    job.start(1, plan._replace(faults=((0, 4, signal.SIGKILL),)))
    job.listen((0, 1, 0), "step", 8)
    job.start(1, plan)
    job.listen()
    ours, theirs = job.steps(0, 1), job.steps(1, 2)
    assert [step.number for step in ours] == [*range(plan.steps)]
    assert theirs[-1].number == plan.steps - 1
    assert [(s.shards, s.states) for s in theirs] == [(s.shards, s.states) for s in ours[theirs[0].number :]]


@pytest.mark.parametrize("job", [(2, 2, 1.0, 3.0)], indirect=True)
def test_too_few_end_with_the_reason(job: Job) -> None:
    job.start(0, Plan(steps=50))
    job.start(1, Plan(steps=50, faults=((0, 3, signal.SIGKILL),)))
    job.listen()
    assert len(job.steps(0, 1)) == 4, "the step under way is taken, and none is begun"
    word, said = job.told[0, 1, 0][-1]
    assert word == "PeerError"
    assert "1 of at least 2 replicas are left" in said
    assert "last checkpoint" in said


@pytest.mark.parametrize("job", [(1, 2, 1.0, 2.0)], indirect=True)
def test_a_replica_that_does_not_come_is_left_out_and_joins_again(job: Job) -> None:
    plan = Plan(steps=80, nap_s=0.08)
    job.start(0, plan)
    job.start(1, plan._replace(late=(4, 4.0)))
    job.listen()
    ours, theirs = job.steps(0, 1), job.steps(1, 1)
    assert [step.number for step in ours] == [*range(80)]
    numbers = [step.number for step in theirs]
    left_out = [step.number for step in ours if step.replicas == (0,)]
    assert left_out[0] == 4
    assert left_out == [*range(4, left_out[-1] + 1)]
    assert numbers == [number for number in range(80) if number not in left_out]
    assert [ours[n].shards + ours[n].states for n in numbers] == [step.shards + step.states for step in theirs]
    assert ours == reference([step.replicas for step in ours], plan)


def test_another_model_is_refused_and_the_others_go_on(job: Job) -> None:
    job.start(0, Plan(steps=25))
    job.start(1, Plan(steps=25))
    job.listen((0, 1, 0), "step", 1)
    job.start(1, Plan(steps=25, width=7))
    job.listen()
    word, said = job.told[1, 2, 0][-1]
    assert word == "UsageError"
    assert "(9, 6)" in said
    assert "(7, 6)" in said
    assert job.told[0, 1, 0][-1] == job.told[1, 1, 0][-1] == ("done", (25, 0))
    assert job.steps(0, 1)[-1].shards == job.steps(1, 1)[-1].shards


SCRIPT = """
import torch, zgraph
from tests.distributed.elastic_job import Plan, batch, net, parts
zgraph.init_distributed()
model, optimizer, schedule = parts(net(9), Plan())
run = zgraph.elastic(model, optimizer, state={"schedule": schedule})
for step in run.steps(STEPS):
    x, y = batch(step, run.replica, 0)
    (model(x) - y).square().mean().backward()
    run.reduce()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
print("ended with", float(sum(p.double().sum() for p in model.parameters())), run.replicas)
"""


@pytest.mark.parametrize("steps", [deep(400)])
def test_torchrun_starts_a_replica_that_joins(job: Job, tmp_path: Path, steps: int) -> None:
    (tmp_path / "train.py").write_text(SCRIPT.replace("STEPS", str(steps)))
    job.start(0, Plan(steps=steps, nap_s=0.05))
    job.start(1, Plan(steps=steps, faults=((0, 2, signal.SIGKILL),)))
    job.listen((0, 1, 0), "step", 4)
    root = str(Path(__file__).parents[2])
    variables = {**os.environ, **job.shared, "ZGRAPH_ELASTIC_REPLICA": "1", "PYTHONPATH": root}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    ended = subprocess.Popen([*torchrun, str(tmp_path / "train.py")], env=variables, stdout=subprocess.PIPE, text=True)
    try:
        job.listen()
        out, _ = ended.communicate(timeout=30)
    finally:
        ended.kill()
    assert ended.returncode == 0
    assert "ended with" in out
    assert "(0, 1)" in out
    assert job.steps(0, 1)[-1].replicas == (0, 1)


@pytest.mark.parametrize(("num_faults", "num_replicas", "num_ranks"), [deep(6, 2, 2), deep(6, 3, 1)])
def test_faults_on_emulated_hosts(num_faults: int, num_replicas: int, num_ranks: int) -> None:
    try:
        outcome = elastic.run(num_faults, seed=5, num_replicas=num_replicas, num_ranks=num_ranks)
    except HostsUnavailable as error:
        pytest.skip(str(error))
    assert sum(outcome.faults.values()) == num_faults
    assert (outcome.num_lost_steps, outcome.num_recaptured) == (0, 0)


def test_what_is_no_module_is_refused() -> None:
    engine: Any = object()
    with pytest.raises(UsageError, match=r"give engine\.module"):
        zgraph.elastic(engine, engine)


def test_a_job_that_loses_too_much_says_how_to_go_on(capfd: pytest.CaptureFixture[str]) -> None:
    script = "print('no luck'); raise SystemExit(3)"
    launcher = Launcher(ranks_here([sys.executable, "-c", script], 1), "127.0.0.1", 1, 1, 1, "zgraph launch t.py")
    assert launcher.run() == 3
    said = capfd.readouterr().err
    assert 'replica 0: it ended with exit code 3, having said "no luck"; it is started again in 0.5 s' in said
    assert "1 of 1 replicas are given up, and it takes 1" in said
    assert "go on from its last checkpoint with: zgraph launch t.py" in said


def test_nothing_is_left_running() -> None:
    script = "import time; time.sleep(60)"
    launcher = Launcher(ranks_here([sys.executable, "-c", script], 2), "127.0.0.1", 2, 2, 0, "", patience_s=0.1)
    launcher.gangs[1].has_ended = True  # so the job takes more than there are
    began = time.monotonic()
    assert launcher.run() == 1
    assert time.monotonic() - began < 15
    assert len(launcher.gangs[0].processes) == 2
    assert all(process.poll() is not None for process in launcher.gangs[0].processes)


GENERATION: dict[str, Any] = json.loads(
    str(Generation(3, (Member(0, 1), Member(1, 4)), (Member(1, 4),), Member(0, 1), 7, 2, "others join"))
)


def test_a_generation_reads_back() -> None:
    made = Generation.parse(json.dumps(GENERATION).encode())
    assert Generation.parse(str(made).encode()) == made


@pytest.mark.parametrize(
    "changed",
    [
        {"members": [[0, 1], [0, 1]]},
        {"members": [[1, 4], [0, 1]]},
        {"members": "all"},
        {"members": [[0, True]]},
        {"joining": [[2, 1]]},
        {"source": [1, 4]},
        {"source": [0, -1]},
        {"step": 1.5},
        {"number": -1},
        {"why": None},
        {"more": 1},
    ],
    ids=str,
)
def test_what_is_no_generation_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"generation|replica"):
        Generation.parse(json.dumps({**GENERATION, **changed}).encode())


@pytest.mark.parametrize("word", [b"", b"{", b"[" * 100_000, b"null", b"\xff"])
def test_bytes_that_are_no_generation_are_refused(word: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        Generation.parse(word)


def test_a_place_is_three_numbers() -> None:
    assert Place.parse(b"3 7 1 0") == Place(3, 7, True, False)
    assert all(Place.parse(word) is None for word in (b"", b"1 2 1", b"a 2 1 1", b"1 -2 1 1", b"9" * 99 + b" 1 1 1"))


def test_a_state_goes_as_json() -> None:
    tensors: list[torch.Tensor] = []
    state = {"a": [1, 2.5, None], 3: ("x", True), "t": torch.arange(3)}
    found = unpack(json.loads(json.dumps(pack(state, tensors, "it"))), tensors)
    assert isinstance(found["t"], Given)
    assert found["t"].tensor is tensors[0]
    assert {**found, "t": 0} == {**state, "t": 0}
    with pytest.raises(StateDictError, match=r"schedule has a set in its state.*leave it out"):
        pack({"s": {1}}, [], "schedule")


def test_the_environment_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ZGRAPH_ELASTIC_STORE", raising=False)
    with pytest.raises(UsageError, match="launch --elastic"):
        elastic_place()
    monkeypatch.setenv("ZGRAPH_ELASTIC_STORE", "host:99999")
    with pytest.raises(UsageError, match="host:99999"):
        elastic_place()
    monkeypatch.setenv("ZGRAPH_ELASTIC_STORE", "::1:80")
    monkeypatch.setenv("ZGRAPH_ELASTIC", "1:2")
    monkeypatch.setenv("ZGRAPH_ELASTIC_REPLICA", "2")
    with pytest.raises(UsageError, match="from 0 to 1"):
        elastic_place()
    for text in ("", "2:1", "0:1", "x:2", "1"):
        with pytest.raises(UsageError, match="as in 1:4"):
            read_range(text, "--elastic")
