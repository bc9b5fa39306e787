"""Ranks that do not do the same, or of which one fails: an error on every rank within seconds, never a hang."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

import zgraph
from zgraph.errors import PeerError, PlanMismatchError, ZgraphError

from .mistakes import Caught, assert_caught, make, train_once
from .nets import WORDS, Mlp, Tied, built, rows, words
from .pool import Pool


class Forked(Mlp):
    """Computes something else where its attribute says so."""

    other = False
    fails = False

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self.fails:
            raise ValueError("the user's own error")
        hidden = self.logits(x)
        return F.cross_entropy(hidden.tanh() if self.other else hidden, y)


def capture_other_graphs(mesh: DeviceMesh) -> Caught:
    model = zgraph.compile(built(Forked)(), mesh=mesh)
    model.other = mesh.get_local_rank() == 1
    inputs = rows(0)

    def same() -> None:
        model.other = False
        train_once(model, inputs)

    return make(model, lambda: model(*inputs), same)


def give_other_shapes(mesh: DeviceMesh) -> Caught:
    model = zgraph.compile(built(Forked)(), mesh=mesh, dynamic=False)
    rank = mesh.get_local_rank()
    return make(model, lambda: model(*rows(0, 6 + rank)), lambda: train_once(model, rows(rank, 12)))


def build_other_models(mesh: DeviceMesh) -> Caught:
    model = Mlp(hidden=24 if mesh.get_local_rank() else 26)
    return make(model, lambda: zgraph.compile(model, mesh=mesh), lambda: _train_new(mesh))


def ask_for_other_stages(mesh: DeviceMesh) -> Caught:
    model = built(Mlp)()
    stage = 3 - mesh.get_local_rank()
    return make(model, lambda: zgraph.compile(model, stage=stage, mesh=mesh), lambda: _train_new(mesh))


def _train_new(mesh: DeviceMesh) -> None:
    train_once(zgraph.compile(built(Mlp)(), mesh=mesh), rows(mesh.get_local_rank()))


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize(
    ("job", "words"),
    [
        (capture_other_graphs, ("rank 0", "rank 1", "tanh", "Remedy")),
        (give_other_shapes, ("rank 0", "rank 1", "[6", "[7", "dynamic=True")),
        (build_other_models, ("first.weight: (26, 12)", "first.weight: (24, 12)", "same model")),
        (ask_for_other_stages, ("partition(stage=3)", "partition(stage=2)", "Remedy")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_ranks_that_do_not_agree(pool: Pool, num_ranks: int, job: object, words: tuple[str, ...]) -> None:
    answers = pool.run(job, num_ranks)
    assert_caught(answers, PlanMismatchError, *words)


@pytest.fixture(scope="module")
def pair() -> Iterator[Pool]:
    """Two workers of this file's own, which are started anew after each job: it leaves communication out of step."""
    pool = Pool(2)
    yield pool
    pool.stop()


def forward_and_backward(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    model(*inputs).backward()


def raise_in_the_forward(mesh: DeviceMesh) -> Caught:
    """The user's own error in a later step, met when the forward is captured anew."""
    model = zgraph.compile(built(Forked)(), stage=3, mesh=mesh)
    train_once(model, rows(0))
    model.fails = mesh.get_local_rank() == 1
    return make(model, lambda: forward_and_backward(model, rows(0)), kind=(ZgraphError, ValueError))


def test_one_rank_raises_in_its_forward(pair: Pool) -> None:
    waiting, failing = pair.run(raise_in_the_forward, 2, spoils=True)
    assert_caught([failing], ValueError, "the user's own error", f"{__file__}:", "the forward of Forked")
    assert_caught([waiting], PeerError, "ValueError on rank 1", "the user's own error", f"{__file__}:")


def look_up_out_of_range(mesh: DeviceMesh) -> Caught | str:
    """An error inside the compiled program, in the first step."""
    model = zgraph.compile(built(Tied)(), stage=2, mesh=mesh)
    inputs = (torch.full((9,), WORDS),) if mesh.get_local_rank() == 1 else words(0)
    try:
        return make(model, lambda: forward_and_backward(model, inputs))
    except IndexError as error:
        return str(error)


def test_one_rank_raises_in_the_compiled_program(pair: Pool) -> None:
    waiting, failing = pair.run(look_up_out_of_range, 2, spoils=True)
    assert failing == "index out of range in self"
    assert_caught([waiting], PeerError, "IndexError on rank 1: index out of range")


def compile_another_later(mesh: DeviceMesh) -> Caught:
    model = zgraph.compile(built(Forked)(), mesh=mesh)
    for _ in range(2):
        train_once(model, rows(0))
    model.first.weight.requires_grad_(mesh.get_local_rank() == 0)
    return make(model, lambda: forward_and_backward(model, rows(0)))


def test_one_rank_compiles_another_program_later(pair: Pool) -> None:
    waiting, compiling = pair.run(compile_another_later, 2, spoils=True)
    assert_caught([compiling], PlanMismatchError, "rank 1 compiled", "rank 0 waits for", 'fullgraph="eager"')
    assert_caught([waiting], PlanMismatchError, "PlanMismatchError on rank 1")
