"""Several backwards before one step of the optimizer, and gradients clipped before it."""

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

import zgraph
from zgraph.compiler.compiled_model import compiled_model
from zgraph.runtime.gradients import is_unreduced

from .lockstep import Lockstep, Side, assert_same, gradient_error
from .nets import Mlp, Odd, built, rows
from .pool import Pool

STAGES = pytest.mark.parametrize("stage", range(4))


def accumulate(mesh: DeviceMesh, stage: int, no_sync: bool) -> tuple[float, float]:
    pair = Lockstep(mesh, built(Mlp), stage=stage)
    for step in range(5):
        pair.step(*(rows(100 * step + 10 * micro + pair.rank) for micro in range(4)), no_sync=no_sync)
    return pair.errors


@STAGES
@pytest.mark.parametrize("no_sync", [True, False], ids=["no_sync", "sync"])
def test_four_micro_steps(pool: Pool, stage: int, no_sync: bool) -> None:
    assert_same(pool.run(accumulate, 3 if stage == 2 else 2, stage, no_sync))


def reduces(mesh: DeviceMesh, stage: int) -> tuple[bool, bool]:
    """Whether gradients are this rank's own after a backward under no_sync, and after one that syncs."""
    model = zgraph.compile(built(Mlp)(), stage=stage, mesh=mesh)
    slots = compiled_model(model).session.store.slots.values()
    with zgraph.no_sync(model):
        model(*rows(mesh.get_local_rank())).backward()
    early = all(is_unreduced(slot) for slot in slots)
    model(*rows(mesh.get_local_rank())).backward()
    return early, any(is_unreduced(slot) for slot in slots)


@STAGES
def test_under_no_sync_only_stages_that_must_not_hold_whole_gradients_reduce(pool: Pool, stage: int) -> None:
    assert pool.run(reduces, 2, stage) == [(stage < 2, False)] * 2


def add_forwards(mesh: DeviceMesh, stage: int) -> float:
    pair = Lockstep(mesh, built(Mlp), stage=stage)
    for side in pair.sides:
        losses = [side.model(*rows(10 * i + pair.rank)) for i in range(3)]
        (losses[0] + 2 * losses[1] + losses[2]).backward()
    return gradient_error(pair.reference.model, pair.ours.model)


@STAGES
def test_several_forwards_before_one_backward(pool: Pool, stage: int) -> None:
    assert max(pool.run(add_forwards, 2, stage)) <= 1e-6


def clip(mesh: DeviceMesh, stage: int) -> tuple[tuple[float, float], list[tuple[float, float]]]:
    norms: list[float] = []

    def clip_side(side: Side) -> None:
        norm = torch.nn.utils.clip_grad_norm_(side.model.parameters(), 0.05)
        norms.append((norm.full_tensor() if isinstance(norm, DTensor) else norm).item())

    pair = Lockstep(mesh, built(Odd), stage=stage)
    for step in range(4):
        pair.step(rows(10 * step + pair.rank), before_update=clip_side)
    return pair.errors, list(zip(norms[::2], norms[1::2], strict=True))


@STAGES
def test_clip_grad_norm(pool: Pool, stage: int) -> None:
    answers = pool.run(clip, 3, stage)
    assert_same([errors for errors, _ in answers])
    for _, norms in answers:
        for theirs, ours in norms:
            assert theirs > 0.05
            assert ours == pytest.approx(theirs, rel=1e-6)
