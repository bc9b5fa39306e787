"""A mesh of two axes: sharded along the second, replicated along the first. And buckets that move in grouped calls."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

import zgraph
from tests.deep import deep
from zgraph.errors import UsageError

from . import zoo
from .lockstep import Lockstep, assert_same
from .nets import Normed, Odd, Tied, built, dice, images, rows, words
from .pool import Pool

STAGES = pytest.mark.parametrize("stage", range(4))


def two_by_two() -> DeviceMesh:
    return DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("replicate", "shard"))


def train(mesh: DeviceMesh, stage: int) -> tuple[tuple[float, float], str, float]:
    pair = Lockstep(mesh, built(Tied), stage=stage, grid=two_by_two())
    for step in range(4):
        pair.step(words(10 * step + pair.rank), words(10 * step + pair.rank + 5), no_sync=step == 2)
    weight = pair.ours.model.embed.weight
    norm = nn.utils.clip_grad_norm_(pair.ours.model.parameters(), 1.0)
    placed = str(weight.placements) if isinstance(weight, DTensor) else "whole"
    return pair.errors, placed, float(norm)


@STAGES
def test_training_is_that_of_ddp(pool: Pool, stage: int) -> None:
    answers = pool.run(train, 4, stage)
    assert_same([errors for errors, _, _ in answers])
    assert {p for _, p, _ in answers} == {"(Replicate(), Shard(dim=0))" if stage else "whole"}


def shapes(mesh: DeviceMesh, kind: str) -> tuple[float, float]:
    build, batch = {"odd": (built(Odd), rows), "buffers": (built(Normed), images)}[kind]
    pair = Lockstep(mesh, build, ddp_options={"broadcast_buffers": True}, grid=two_by_two())
    for step in range(3):
        pair.step(batch(10 * step + pair.rank))
    return pair.errors


@pytest.mark.parametrize("kind", ["odd", "buffers"])
def test_uneven_sizes_and_buffers(pool: Pool, kind: str) -> None:
    assert_same(pool.run(shapes, 4, kind))


def uncaptured(mesh: DeviceMesh) -> tuple[float, float]:
    pair = Lockstep(mesh, built(Tied), fullgraph="eager", grid=two_by_two())
    for step in range(3):
        pair.step(words(10 * step + pair.rank))
    return pair.errors


@pytest.mark.filterwarnings("ignore:fullgraph")
def test_a_model_that_is_not_captured(pool: Pool) -> None:
    assert_same(pool.run(uncaptured, 4))


def load(mesh: DeviceMesh) -> bool:
    """A whole state dict goes in, and comes out again."""
    state = {k: v + 1 for k, v in built(Tied)().state_dict().items()}
    model = zgraph.compile(built(Tied)(), mesh=two_by_two())
    model.load_state_dict(state)
    found = model.state_dict()
    return all(torch.equal(found[k].full_tensor(), v) for k, v in state.items())


def test_a_whole_state_dict_is_loaded(pool: Pool) -> None:
    assert pool.run(load, 4) == [True] * 4


def refused(mesh: DeviceMesh) -> list[str]:
    said = []
    for ranks in ([[1, 0], [2, 3]], [[0], [1], [2], [3]]):
        try:
            zgraph.compile(built(Tied)(), mesh=DeviceMesh("cpu", ranks, mesh_dim_names=("a", "b")))
        except UsageError as error:
            said.append(str(error))
    return said


def test_other_meshes_are_refused(pool: Pool) -> None:
    for said in pool.run(refused, 4):
        assert len(said) == 2
        assert all("two ranks or more along the second" in text for text in said)


def grouped(mesh: DeviceMesh, stage: int) -> tuple[tuple[float, float], int]:
    recipe = zgraph.recipe(stage).replace("all-gather", "all-gather(grouped=true)")
    recipe = recipe.replace("reduce-scatter", "reduce-scatter(grouped=true)")
    pair = Lockstep(mesh, zoo.builder("llama"), passes=recipe)
    for step in range(3):
        ids = torch.randint(zoo.VOCABULARY, (2, 12), generator=dice(10 * step + pair.rank))
        pair.step({"input_ids": ids, "labels": ids}, {"input_ids": ids, "labels": ids}, no_sync=step == 1)
    (plan,) = pair.ours.model._zgraph.session.plans
    return pair.errors, max(len(node.operands) for node in plan.collectives)


@pytest.mark.parametrize("stage", [deep(1), deep(2), 3])
def test_grouped_calls_give_what_packed_buckets_give(pool: Pool, stage: int) -> None:
    answers = pool.run(grouped, 2, stage)
    assert_same([errors for errors, _ in answers])
    assert all(most > 1 for _, most in answers)
