"""Copies of shards in the memory of hosts: a lost host is restored from its neighbour's, to the last bit."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import zgraph
from tests.deep import DEEP, deep
from zgraph.engine.checkpoint.memory import copies
from zgraph.engine.engine import Engine

from .nets import Odd, rows
from .pool import Pool

EVERY, STEPS, LAST = 2, 7, 9
Damage = Callable[[Path], None]


def engine_of(folder: Path, num_hosts: int, stage: int = 3, **memory: Any) -> Engine:
    """An engine on this rank of so many hosts, which are folders."""
    host = dist.get_rank() * num_hosts // dist.get_world_size()
    keys = {"every": EVERY, "job": "a-job", "folder": str(folder / f"host{host}"), **memory}
    torch.manual_seed(5)
    return zgraph.initialize_engine(
        model=Odd(),
        config={
            "train_batch_size": 12,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
            "zero_optimization": {"stage": stage},
            "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 3, "total_num_steps": 12}},
            "checkpoint": {"memory": keys},
        },
    )[0]


def losses(engine: Engine, until: int) -> list[float]:
    """The losses of this rank's rows, each of which also depends on a number that is drawn."""
    found = []
    while engine.global_steps < until:
        x, y = (t.chunk(dist.get_world_size())[dist.get_rank()] for t in rows(engine.global_steps, 12))
        loss = engine(x + torch.rand(()), y)
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    return found


def train(_: DeviceMesh, folder: Path, num_hosts: int, stage: int) -> list[float]:
    """The losses of all steps; copies are made of the second, the fourth and the sixth."""
    plain = engine_of(folder, num_hosts, stage, every=0)
    torch.manual_seed(dist.get_rank())
    expected = losses(plain, LAST)
    engine = engine_of(folder, num_hosts, stage)
    torch.manual_seed(dist.get_rank())
    found = losses(engine, 1)
    engine.save_checkpoint(folder / "disk", client_state={"from": "disk"})
    found += losses(engine, STEPS)
    engine.wait_for_checkpoint()
    kept = engine._checkpoints.copies
    assert kept is not None
    kept.wait()
    with patch.object(copies.Copies, "make"):
        found += losses(engine, LAST)
    assert found == expected
    return found


def resume(_: DeviceMesh, folder: Path, num_hosts: int, stage: int) -> tuple[int, Any, list[float], str]:
    """The step at which training goes on, the state of its client, the losses from there, and what was told."""
    engine = engine_of(folder, num_hosts, stage)
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("zgraph").addHandler(handler)
    try:
        _, client_state = engine.load_checkpoint(folder / "disk")
    finally:
        logging.getLogger("zgraph").removeHandler(handler)
    step, found = engine.global_steps, losses(engine, LAST)
    assert not list(folder.rglob(".reading_*"))
    engine.destroy()
    return step, client_state, found, "\n".join(told)


def newest(folder: Path, rank: int, host: int) -> Path:
    places = (folder / f"host{host}").glob(f"zgraph-*/a-job/rank_{rank}/[!.]*")
    return max(places, key=lambda path: int(path.name.split(".")[1]))


def flip(path: Path) -> None:
    held = bytearray((path / "rank_0_0.safetensors").read_bytes())
    held[-3] ^= 1
    (path / "rank_0_0.safetensors").write_bytes(held)


def nothing(folder: Path) -> None:
    pass


def second_host_is_lost(folder: Path) -> None:
    shutil.rmtree(folder / "host1")


def first_host_is_lost(folder: Path) -> None:
    shutil.rmtree(folder / "host0")


def one_copy_is_torn(folder: Path) -> None:
    flip(newest(folder, 0, 0))


def the_newest_are_torn(folder: Path) -> None:
    for host in (0, 1):
        flip(newest(folder, 0, host))


def the_first_ranks_are_lost(folder: Path) -> None:
    for host in (0, 1):
        shutil.rmtree(newest(folder, 0, host).parent)


def one_was_being_written(folder: Path) -> None:
    path = newest(folder, 0, 1)
    path.rename(path.with_name(f".{path.name}.1234abcd"))
    shutil.rmtree(folder / "host0")


CASES: dict[Damage, tuple[int, str]] = {
    second_host_is_lost: (6, "by copies in memory"),
    the_newest_are_torn: (4, "of step 6 there is no copy of rank 0"),
    the_first_ranks_are_lost: (1, "the checkpoint on disk of step 1: of step 6 there is no copy of rank 0"),
}
MORE: dict[Damage, tuple[int, str]] = {
    nothing: (6, "by copies in memory"),
    first_host_is_lost: (6, "by copies in memory"),
    one_copy_is_torn: (6, "is not used: "),
    one_was_being_written: (4, "of step 6 there is no copy of rank 0"),
}


@pytest.mark.parametrize(("num_ranks", "stage"), [(2, 3), deep(4, 3), deep(4, 1)])
def test_a_lost_host_is_restored_to_the_last_bit(tmp_path: Path, num_ranks: int, stage: int) -> None:
    pool, again = Pool(num_ranks), Pool(num_ranks)
    try:
        expected = pool.run(train, num_ranks, tmp_path / "run", 2, stage)
        pool.stop()  # killed, as by a launcher
        for damage, (step, words) in (CASES | MORE if DEEP else CASES).items():
            folder = tmp_path / damage.__name__
            shutil.copytree(tmp_path / "run", folder)
            damage(folder)
            for rank, (begun, state, found, told) in enumerate(again.run(resume, num_ranks, folder, 2, stage)):
                assert begun == step, damage
                assert state == ({"from": "disk"} if step == 1 else {})
                assert found == expected[rank][step:], damage
                assert rank or words in told, damage
            assert not list(folder.glob("host*/zgraph-*/*")), "removed when the job had ended"
    finally:
        pool.stop()
        again.stop()


@pytest.mark.parametrize("stage", [deep(3)])
def test_the_host_that_is_left_goes_on_with_fewer_ranks(pool: Pool, tmp_path: Path, stage: int) -> None:
    pool.run(train, 4, tmp_path, 2, stage, spoils=True)
    second_host_is_lost(tmp_path)
    fewer = Pool(2)
    try:
        for begun, _, found, _ in fewer.run(resume, 2, tmp_path, 1, 2):
            assert begun == 6
            assert len(found) == LAST - 6
    finally:
        fewer.stop()
