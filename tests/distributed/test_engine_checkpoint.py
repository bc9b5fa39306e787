"""Checkpoints of the engine: resumed at other numbers of ranks and stages, and when a rank fails or is killed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import zgraph
from benchmarks import kills
from zgraph.engine.checkpoint import background, checkpoint, storage
from zgraph.engine.engine import Engine
from zgraph.errors import CheckpointError

from .nets import Odd, rows
from .pool import Pool

GLOBAL_ROWS, ACCUMULATION = 24, 2


@pytest.fixture(scope="module")
def two() -> Iterator[Pool]:
    """Two processes joined by gloo."""
    pool = Pool(2)
    yield pool
    pool.stop()


def engine_of(stage: int, seed: int = 0, mesh: DeviceMesh | None = None, **more: Any) -> Engine:
    torch.manual_seed(seed)
    engine, *_ = zgraph.initialize_engine(
        model=Odd(),
        mesh=mesh,
        config={
            "train_batch_size": GLOBAL_ROWS,
            "gradient_accumulation_steps": ACCUMULATION,
            "gradient_clipping": 0.5,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
            "zero_optimization": {"stage": stage},
            "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 3, "total_num_steps": 12}},
            **more,
        },
    )
    return engine


def losses(engine: Engine, until: int) -> list[float]:
    """The losses of the steps up to this one, of all ranks' rows."""
    rank, size = dist.get_rank(), dist.get_world_size()
    found = []
    while engine.global_steps < until:
        total = torch.zeros(())
        parts = [t.chunk(ACCUMULATION) for t in rows(engine.global_steps, GLOBAL_ROWS)]
        for x, y in zip(*parts, strict=True):
            loss = engine(x.chunk(size)[rank], y.chunk(size)[rank])
            engine.backward(loss)
            engine.step()
            total += loss.detach() / size / ACCUMULATION
        dist.all_reduce(total)
        found.append(total.item())
    return found


def save(_: DeviceMesh, path: Path) -> list[float]:
    engine = engine_of(3)
    losses(engine, 4)
    engine.save_checkpoint(path, client_state={"best": 0.5, 7: [1]})
    found = losses(engine, 9)
    engine.wait_for_checkpoint()
    return found


def with_codes(_: DeviceMesh, path: Path, keys: dict[str, Any]) -> tuple[list[float], list[float], bool]:
    """Losses behind a checkpoint of a run whose gradients are coded: as it goes on, and as another resumes it."""
    engine = engine_of(0, **keys)
    losses(engine, 4)
    engine.save_checkpoint(path)
    kept = losses(engine, 8)
    again = engine_of(0, seed=1, **keys)
    again.load_checkpoint(path)
    plain = engine_of(0, seed=1)
    plain.load_checkpoint(path)  # rests of codes mean nothing to it
    return kept, losses(again, 8), losses(plain, 8) != kept


@pytest.mark.parametrize(
    "keys",
    [
        {"zgraph": {"compress": "sign"}, "zero_optimization": {"stage": 1}},
        {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}},
    ],
    ids=["a codec", "zero_quantized_gradients"],
)
def test_what_codes_left_out_is_saved(two: Pool, tmp_path: Path, keys: dict[str, Any]) -> None:
    for kept, again, differs in two.run(with_codes, 2, tmp_path, keys):
        assert kept == again
        assert differs


def with_an_optimizer_of_torchs(mesh: DeviceMesh, path: Path) -> None:
    """A parameter without dimensions has moments that look like its step."""

    def engine_with() -> Engine:
        config = {"train_micro_batch_size_per_gpu": 6, "zero_optimization": {"stage": 3}}
        return zgraph.initialize_engine(model=Odd(), mesh=mesh, config=config, optimizer=torch.optim.NAdam)[0]

    def step(engine: Engine) -> float:
        engine.backward(engine(*rows(engine.global_steps, 6)))
        engine.step()
        return engine(*rows(0, 6)).item()

    engine, again = engine_with(), engine_with()
    step(engine)
    engine.save_checkpoint(path)
    again.load_checkpoint(path)
    assert step(again) == step(engine)


def test_an_optimizer_of_torchs_goes_on(two: Pool, tmp_path: Path) -> None:
    two.run(with_an_optimizer_of_torchs, 2, tmp_path)


def resume(_: DeviceMesh, path: Path, stage: int) -> tuple[list[float], Any, int]:
    engine = engine_of(stage, seed=1)
    _, client_state = engine.load_checkpoint(path)
    return losses(engine, 9), client_state, engine.micro_steps


def test_resumed_at_other_numbers_of_ranks_and_stages(pool: Pool, two: Pool, tmp_path: Path) -> None:
    expected = pool.run(save, 4, tmp_path)[0]
    three = Pool(3)
    try:
        for fewer, stage in ((two, 1), (three, 2)):
            for found, client_state, micro_steps in fewer.run(resume, fewer.num_workers, tmp_path, stage):
                assert found == pytest.approx(expected, rel=1e-6), f"on {fewer.num_workers} ranks, stage {stage}"
                assert client_state == {"best": 0.5, 7: [1]}
                assert micro_steps == 9 * ACCUMULATION
    finally:
        three.stop()


def half_a_step(engine: Engine, mesh: DeviceMesh, micro: range) -> list[float]:
    """The losses of some micro-batches, each of all ranks' rows."""
    found = []
    for at in micro:
        x, y = rows(at, GLOBAL_ROWS)
        loss = engine(x.chunk(mesh.size())[mesh.get_local_rank()], y.chunk(mesh.size())[mesh.get_local_rank()])
        engine.backward(loss)
        engine.step()
        total = loss.detach() / mesh.size()
        dist.all_reduce(total, group=mesh.get_group())
        found.append(total.item())
    return found


def save_apart(mesh: DeviceMesh, path: Path) -> tuple[list[float], list[float]]:
    """Losses of an engine on two of the four ranks, and after resuming, beside another on the two that are left."""
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pair", "shard"))
    pair, own = mesh.get_local_rank() // 2, pairs["shard"]
    if pair:
        dist.new_group([dist.get_rank()], use_local_synchronization=True)  # ranks need not have made the same groups
    engine = engine_of(3, mesh=own)
    half_a_step(engine, own, range(2))
    engine.save_checkpoint(path / str(pair))
    expected = half_a_step(engine, own, range(2, 6))
    again = engine_of(2, seed=1, mesh=own)
    again.load_checkpoint(path / str(pair))
    return expected, half_a_step(again, own, range(2, 6))


def test_engines_on_some_of_the_ranks_each(pool: Pool, tmp_path: Path) -> None:
    for expected, found in pool.run(save_apart, 4, tmp_path, spoils=True):
        assert found == pytest.approx(expected, rel=1e-6)


def save_within(mesh: DeviceMesh, path: Path, stage: int) -> list[float]:
    """Losses after a checkpoint that is saved after six micro-batches, two of the four that a step has."""
    engine = engine_of(stage, train_batch_size=4 * GLOBAL_ROWS, gradient_accumulation_steps=4)
    half_a_step(engine, mesh, range(6))
    engine.save_checkpoint(path, client_state={"rank": mesh.get_local_rank()})
    found = half_a_step(engine, mesh, range(6, 20))
    engine.wait_for_checkpoint()
    return found


def resume_within(mesh: DeviceMesh, path: Path, stage: int) -> tuple[list[float], dict[str, Any] | None]:
    engine = engine_of(stage, 1, train_batch_size=4 * GLOBAL_ROWS, gradient_accumulation_steps=4)
    _, client_state = engine.load_checkpoint(path)
    return half_a_step(engine, mesh, range(6, 20)), client_state


@pytest.mark.parametrize("stage", [1, 3])
def test_a_step_under_way_goes_on_and_client_state_comes_back_to_its_rank(
    pool: Pool, two: Pool, tmp_path: Path, stage: int
) -> None:
    expected = two.run(save_within, 2, tmp_path, stage)[0]
    for ranks, other in ((two, stage), (pool, 4 - stage)):
        for rank, (found, client_state) in enumerate(ranks.run(resume_within, ranks.num_workers, tmp_path, other)):
            assert found == pytest.approx(expected, rel=1e-6), f"on {ranks.num_workers} ranks, stage {other}"
            assert client_state == {"rank": rank if stage == 3 and rank < 2 else 0}


def fail(_: DeviceMesh, path: Path, is_async: bool) -> tuple[list[str], int, list[str]]:
    """What the ranks say if one cannot write, if tags differ, and where they then go on."""
    engine = engine_of(2, checkpoint={"tag_validation": "Fail", "asynchronous": is_async})
    losses(engine, 2)
    engine.save_checkpoint(path)
    said = []
    for tag in ("full", f"of-{dist.get_rank()}"):
        losses(engine, engine.global_steps + 1)
        engine.wait_for_checkpoint()
        no_room = OSError(28, "No space left on device") if dist.get_rank() == 2 else None
        where: tuple[Any, str] = (background, "write_parts") if is_async else (storage, "write_tensors")
        with patch.object(*where, side_effect=no_room, wraps=getattr(*where)):
            try:
                engine.save_checkpoint(path, tag)
                losses(engine, engine.global_steps + 1)
                engine.wait_for_checkpoint()
            except CheckpointError as error:
                said.append(str(error))
    engine.load_checkpoint(path)
    return said, engine.global_steps, sorted(p.name for p in path.iterdir())


@pytest.mark.parametrize("is_async", [False, True])
def test_what_fails_on_one_rank_is_the_same_error_on_all_and_loses_nothing(
    pool: Pool, tmp_path: Path, is_async: bool
) -> None:
    answers = pool.run(fail, 4, tmp_path, is_async)
    assert all(answer == answers[0] for answer in answers)
    said, step, left = answers[0]
    assert "No space left on device" in said[0]
    assert "of-0, of-1, of-2, of-3" in said[1]
    assert step == 2
    assert left == ["global_step2", "latest"]


def meanwhile(_: DeviceMesh, path: Path, limit: int) -> tuple[list[float], list[float], list[float], bool, int]:
    """Losses without a checkpoint, while one is written, and after it; whether it was there at once, and the memory
    that it took.
    """
    plain = losses(engine_of(3), 8)
    engine = engine_of(3, checkpoint={"memory_limit": limit})
    first = losses(engine, 4)
    held, begun = threading.Event(), background.write_parts

    def late(*args: Any) -> Any:
        held.wait(60)
        return begun(*args)

    many = {f"more.{at}": torch.full((5000 + at,), float(at)) for at in range(20)}
    taken = checkpoint.tensors_of
    with patch.object(checkpoint, "tensors_of", lambda engine: taken(engine) | many):
        if limit > 1 << 20:
            with patch.object(background, "write_parts", late):
                engine.save_checkpoint(path)
                rest = losses(engine, 8)
                is_there = (path / "latest").exists()
                held.set()
                engine.wait_for_checkpoint()
        else:
            engine.save_checkpoint(path)
            rest, is_there = losses(engine, 8), False
    again = engine_of(3, seed=1)
    again.load_checkpoint(path)
    most = engine._checkpoints._background.staging.most_bytes
    reader = storage.Reader(path / "global_step4")
    assert all(torch.equal(reader.whole(name), tensor) for name, tensor in many.items())
    return plain, first + rest, first + losses(again, 8), is_there, most


@pytest.mark.parametrize("limit", [64 << 20, 1 << 16])
def test_training_goes_on_while_a_checkpoint_is_written(two: Pool, tmp_path: Path, limit: int) -> None:
    for plain, with_one, resumed, is_there, most in two.run(meanwhile, 2, tmp_path, limit):
        assert plain == with_one == resumed
        assert not is_there
        assert 0 < most <= limit


@pytest.mark.parametrize("num_kills", [2])
def test_killed_ranks_go_on_from_a_complete_checkpoint(num_kills: int) -> None:
    outcome = kills.run(num_kills, num_ranks=2, seed=3)
    assert outcome.num_kills == num_kills
    assert outcome.num_steps
