"""Training with gathered parameters and buckets in arenas is the same training."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

import zgraph

from .lockstep import Lockstep, assert_same
from .nets import Odd, Tied, built, rows, words
from .pool import Pool
from .test_memory import in_arenas

STAGES = pytest.mark.parametrize("stage", range(4))
GROUPED = pytest.mark.parametrize("grouped", [False, True])


def recipe(stage: int, grouped: bool) -> str:
    """Stage N's, in arenas; grouped as on GPUs, where parameters are gathered without a bucket."""
    found = in_arenas(stage)
    for name in ("all-gather", "reduce-scatter"):
        found = found.replace(name, f"{name}(grouped={str(grouped).lower()})")
    return found


def train(mesh: DeviceMesh, stage: int, grouped: bool) -> tuple[float, float]:
    """Uneven shards, and micro-steps without sync."""
    pair = Lockstep(mesh, built(Odd), stage=stage, passes=recipe(stage, grouped))
    for step in range(3):
        pair.step(rows(10 * step + pair.rank), rows(10 * step + pair.rank + 5), no_sync=True)
    return pair.errors


@STAGES
@GROUPED
def test_training_is_that_of_ddp(pool: Pool, stage: int, grouped: bool) -> None:
    assert_same(pool.run(train, 3, stage, grouped))


def two_calls(mesh: DeviceMesh, grouped: bool) -> tuple[list[float], list[float]]:
    """Gradients with two forwards before their backward, with arenas and without."""
    found = []
    for passes in (zgraph.recipe(3), recipe(3, grouped)):
        model = zgraph.compile(built(Tied)(), mesh=mesh, passes=passes)
        first, second = (model(*words(seed + mesh.get_local_rank())) for seed in (0, 7))
        (first + 2 * second).backward()
        found.append([p.grad.full_tensor().sum().item() for p in model.parameters() if p.grad is not None])
    return found[0], found[1]


@GROUPED
def test_each_call_has_an_arena_of_its_own(pool: Pool, grouped: bool) -> None:
    for plain, in_arena in pool.run(two_calls, 2, grouped):
        assert torch.tensor(plain).isfinite().all()
        assert in_arena == plain
