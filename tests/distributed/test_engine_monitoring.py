"""What several ranks tell of themselves: names in torch's profiler, collectives in a table, and where a rank hangs."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

import zgraph
from zgraph.compiler.compiled_model import compiled_model
from zgraph.compiler.report import mebibytes
from zgraph.errors import PeerError
from zgraph.ir.ops import moved_bytes
from zgraph.runtime import peers
from zgraph.viz import as_text

from .nets import Mlp, built, rows
from .pool import Pool


def profiled(mesh: DeviceMesh) -> tuple[list[str], list[str], float]:
    """Names of the ranges in a profile of a step, those that the plan has, and how far losses are with it from without.

    The names are those of the time at which they began.
    """
    model = zgraph.compile(built(Mlp)(), mesh=mesh)
    inputs = rows(mesh.get_local_rank())
    loss = model(*inputs)
    loss.backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        again = model(*inputs)
        again.backward()
    plan = zgraph.report(model).entries[0].plan
    programs = (plan.forward, plan.loss_only[0] if plan.loss_only else plan.backward)
    wanted = [f"%{i.node.name} {i.node.op}" for program in programs for i in program.instructions]
    found = sorted((e for e in profile.events() if e.name.startswith("%")), key=lambda e: e.time_range.start)
    return [e.name for e in found], wanted, float((again - loss).abs())


def test_the_profiler_names_what_runs_as_the_plan_does(pool: Pool) -> None:
    for found, wanted, difference in pool.run(profiled, 2):
        assert found == wanted
        assert any("all_gather_start" in name for name in found)
        assert difference == 0


@dataclass(frozen=True)
class Logged:
    """What a rank logged in two steps, and what the plan's collectives must be told as.

    Args:
        records: what was logged.
        rows: kind, calls, bytes sent of the collectives.
        num_different, num_measured: collectives that differ, and that were measured.
        table: the table if each call took a microsecond.
        rates: the bus bandwidth of each row then, as nccl-tests defines it.
    """

    records: list[str]
    rows: list[tuple[str, int, str]]
    num_different: int
    num_measured: int
    table: str
    rates: list[float]


def logged(mesh: DeviceMesh) -> Logged:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("zgraph")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        engine = zgraph.initialize_engine(model=built(Mlp)(), config=CONFIG, mesh=mesh)[0]
        for _ in range(2):
            engine.backward(engine(*rows(mesh.get_local_rank())))
            engine.step()
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    entry, times = zgraph.report(engine.module).entries[0], engine.monitor.collectives
    counted = [(t.op.removesuffix("_start"), t.num_calls, mebibytes(t.sent_bytes)) for t in entry.traffic]
    axes = entry.plan.graph.mesh
    different = {(n.op, moved_bytes(n, axes)) for n in entry.plan.collectives}
    num_measured, times.seconds = len(times.seconds), dict.fromkeys(times.seconds, 1e-6)
    rates = []
    for row in entry.traffic:
        alike = [n for n in entry.plan.collectives if (n.op, n.phase.value) == (row.op, row.phase)]
        factor = 1.0 if row.op == "all_reduce_start" else 0.5  # of two ranks
        rates.append(sum(factor * moved_bytes(n, axes) for n in alike) / len(alike) / 1e3)
    return Logged(records, counted, len(different), num_measured, as_text(times.table(entry.plan), width=110), rates)


def cells(table: str) -> list[list[str]]:
    """The rows of a table of collectives."""
    lines = [line for line in table.splitlines() if "GB/s" in line]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


CONFIG = {
    "train_micro_batch_size_per_gpu": 6,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 10},
    "comms_logger": {"enabled": True},
    "steps_per_print": 1,
}


def test_the_table_of_collectives_is_that_of_the_plan(pool: Pool) -> None:
    first, second = pool.run(logged, 2)
    assert not second.records, "only the first rank tells"
    assert first.num_measured == first.num_different > 2
    lines = [r for r in first.records if r.startswith("step")]
    assert [line.split(":")[0] for line in lines] == ["step 1", "step 2"]
    assert all("communication exposed" in line for line in lines)
    tables = [r for r in first.records if not r.startswith(("step", "captured"))]
    assert len(tables) == 2
    assert tables[0] == tables[1], "measured once"
    assert [(op, int(calls), sent) for op, _, calls, sent, *_ in cells(tables[0])] == first.rows
    assert all(float(taken.split()[0]) > 0 for *_, taken, _ in cells(tables[0]))
    assert {op for op, *_ in first.rows} == {"all_gather", "reduce_scatter", "all_reduce"}
    found = [float(rate.removesuffix(" GB/s")) for *_, rate in cells(first.table)]
    assert found == pytest.approx(first.rates, abs=6e-4)


def sleeping(mesh: DeviceMesh, sleeper: int) -> tuple[str, float]:
    """What a rank is told when one sleeps before its third call until another has given up, and the seconds till then.

    All of them can go on afterwards.
    """
    rank = mesh.get_local_rank()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZGRAPH_TIMEOUT", "60")
        patch.setattr(peers, "GONE_AFTER_SECONDS", 2.0)
        model = zgraph.compile(built(Mlp)(), mesh=mesh)
        others = compiled_model(model).session.peers
        for _ in range(2):
            model(*rows(rank)).backward()
        assert others.limit_s == 60
        others.limit_s = 1.0
        began = time.monotonic()
        failed = f"{others.name}/{others.call + 1}/failed"
        while rank == sleeper and not others.store.check([failed]):
            time.sleep(0.1)
        try:
            model(*rows(rank)).backward()
        except PeerError as error:
            seconds, said = time.monotonic() - began, str(error)
        others.limit_s = 60
        model(*rows(rank)).backward()
    return said, seconds


def test_a_rank_that_does_not_come_is_told_of(pool: Pool) -> None:
    answers = pool.run(sleeping, 3, 1)
    for said, seconds in answers:
        assert "has waited for 1 s: rank 0 waits for %" in said
        assert "(all_gather_start, forward) in call 3; rank 1 has not answered for" in said
        of_sleeper, of_third = said.partition("rank 1 has not answered")[2].split("; rank 2 ")
        assert "last seen in call 2, after %" in of_sleeper
        assert "(reduce_scatter_start, backward)" in of_sleeper
        assert of_third.startswith("waits for %")
        assert "ZGRAPH_TIMEOUT" in said
        assert seconds < 20
    assert answers[1][0].startswith("another rank failed")
