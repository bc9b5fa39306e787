"""What changes from call to call: random numbers, sizes, train and eval, buffers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from tests.deep import deep

from . import zoo
from .lockstep import Lockstep, assert_same, loss_of
from .nets import Dropping, Mlp, Normed, Tied, built, dice, images, rows, words
from .pool import Pool

STAGES = pytest.mark.parametrize("stage", range(4))


def drop(mesh: DeviceMesh, stage: int) -> tuple[tuple[float, float], list[float]]:
    pair = Lockstep(mesh, built(Dropping), stage=stage)
    for _ in range(5):
        pair.step(rows(pair.rank))
    return pair.errors, pair.ours.losses


@STAGES
def test_dropout_draws_what_it_draws_under_ddp(pool: Pool, stage: int) -> None:
    answers = pool.run(drop, 2, stage)
    assert_same([errors for errors, _ in answers])


def change_sizes(mesh: DeviceMesh, stage: int) -> tuple[float, float]:
    pair = Lockstep(mesh, built(partial(zoo.llama, num_layers=1)), stage=stage)
    for step, shape in enumerate([(2, 12), (3, 12), (3, 17), (5, 24), (2, 12)]):
        ids = torch.randint(zoo.VOCABULARY, shape, generator=dice(10 * step + pair.rank))
        pair.step({"input_ids": ids, "labels": ids})
    return pair.errors


@pytest.mark.parametrize("stage", [deep(1), 3])
def test_batch_and_sequence_change_between_steps(pool: Pool, stage: int) -> None:
    assert_same(pool.run(change_sizes, 2, stage))


def differ_in_size(mesh: DeviceMesh, stage: int) -> tuple[float, float]:
    pair = Lockstep(mesh, built(Tied), stage=stage, dynamic=True)
    for step in range(4):
        pair.step(words(10 * step + pair.rank, length=7 + 3 * step + 5 * pair.rank))
    return pair.errors


@STAGES
def test_ranks_may_have_other_sizes_in_the_same_step_with_dynamic(pool: Pool, stage: int) -> None:
    assert_same(pool.run(differ_in_size, 3, stage))


def first_differ_in_size(mesh: DeviceMesh, fullgraph: bool, sizes: list[tuple[int, int]]) -> tuple[float, float]:
    """Rows of each rank in each step."""
    pair = Lockstep(mesh, built(WithDropout), stage=3, fullgraph=fullgraph)
    for step, of_ranks in enumerate(sizes):
        pair.step(rows(10 * step + pair.rank, of_ranks[pair.rank]))
    return pair.errors


class WithDropout(Mlp):
    """Random numbers must not be drawn for a batch that is only captured."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return super().forward(F.dropout(x, 0.2, self.training), y)


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize(
    "sizes", [[(6, 7), (5, 9), (8, 8)], [(1, 6), (6, 1), (3, 4)], [(6, 1), (1, 1)], [(6, 6), (6, 1), (2, 6)]], ids=str
)
def test_ranks_may_begin_with_other_sizes(pool: Pool, sizes: list[tuple[int, int]], fullgraph: bool) -> None:
    assert_same(pool.run(first_differ_in_size, 2, fullgraph, sizes))


def later_differ_in_size(mesh: DeviceMesh, stage: int) -> tuple[float, float]:
    pair = Lockstep(mesh, built(Tied), stage=stage)
    for step in range(5):
        pair.step(words(10 * step + pair.rank, length=9 + (step * pair.rank if step > 1 else 0)))
    return pair.errors


@STAGES
def test_a_rank_that_meets_a_new_size_alone_does_not_disturb_the_others(pool: Pool, stage: int) -> None:
    assert_same(pool.run(later_differ_in_size, 2, stage))


NO_GRADIENTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
}


class Both(nn.Module):
    """Dropout and BatchNorm, which both do something else in eval()."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.drop = Normed(), nn.Dropout(0.3)

    def forward(self, image: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.net(self.drop(image), y)


def evaluate_between(mesh: DeviceMesh, stage: int, mode: str) -> tuple[tuple[float, float], float]:
    pair = Lockstep(mesh, built(Both), stage=stage)
    worst = 0.0
    for step in range(4):
        pair.step(images(10 * step + pair.rank))
        found = []
        for side in pair.sides:
            side.model.eval()
            with NO_GRADIENTS[mode]():
                found.append(loss_of(side.model, images(5)).item())
            side.model.train()
        worst = max(worst, abs(found[0] - found[1]) / found[0])
    return pair.errors, worst


@pytest.mark.parametrize("mode", NO_GRADIENTS)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_evaluation_between_steps(pool: Pool, stage: int, mode: str) -> None:
    answers = pool.run(evaluate_between, 2, stage, mode)
    assert_same([errors for errors, _ in answers])
    assert max(worst for _, worst in answers) <= 1e-6


def run_statistics(mesh: DeviceMesh, stage: int) -> tuple[tuple[float, float], list[dict[str, list[float]]]]:
    pair = Lockstep(mesh, built(Normed), stage=stage)
    for step in range(6):
        pair.step(images(10 * step + pair.rank))
    reference, ours = pair.reference.model.module, pair.ours.model
    return pair.errors, [{n: b.flatten().tolist() for n, b in model.named_buffers()} for model in (reference, ours)]


@STAGES
def test_batch_norm_statistics_are_those_of_the_first_rank_under_ddp(pool: Pool, stage: int) -> None:
    answers = pool.run(run_statistics, 3, stage)
    assert_same([errors for errors, _ in answers])
    expected, _ = answers[0][1]
    assert expected["norm.num_batches_tracked"] == [6]
    for _, (_, buffers) in answers:
        assert buffers.keys() == expected.keys()
        for name, values in expected.items():
            assert buffers[name] == pytest.approx(values, rel=1e-6), name
