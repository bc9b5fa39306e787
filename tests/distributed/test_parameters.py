"""Parameters of every kind: tied, uneven, frozen, unused, with a stage of their own, on the meta device."""

import math

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import zgraph

from . import zoo
from .lockstep import Lockstep, assert_same
from .nets import Mlp, Odd, Tied, built, rows, words
from .pool import Pool

SHARDED = pytest.mark.parametrize("stage", [1, 2, 3])


def tie(mesh: DeviceMesh, stage: int) -> tuple[float, float]:
    pair = Lockstep(mesh, built(Tied), stage=stage)
    model = pair.ours.model
    assert model.head.weight is model.embed.weight
    assert list(model.state_dict()) == list(built(Tied)().state_dict())
    assert len(list(model.parameters())) == 3
    for step in range(5):
        pair.step(words(10 * step + pair.rank))
    return pair.errors


@pytest.mark.parametrize("stage", range(4))
def test_tied_weights(pool: Pool, stage: int) -> None:
    assert_same(pool.run(tie, 2, stage))


def divide_unevenly(mesh: DeviceMesh, stage: int) -> tuple[tuple[float, float], list[int]]:
    pair = Lockstep(mesh, built(Odd), stage=stage)
    for step in range(5):
        pair.step(rows(10 * step + pair.rank))
    return pair.errors, [p.to_local().numel() for p in pair.ours.model.parameters() if p.dim()]


@SHARDED
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_uneven_sizes(pool: Pool, num_ranks: int, stage: int) -> None:
    answers = pool.run(divide_unevenly, num_ranks, stage)
    assert_same([errors for errors, _ in answers])
    sizes = [p.numel() for p in Odd().parameters() if p.dim()]
    assert [sum(s) for s in zip(*(s for _, s in answers), strict=True)] == sizes


class Partly(Mlp):
    """A net with a layer that no forward uses."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(3, 3)
        self.first.weight.requires_grad_(False)


def train_partly(mesh: DeviceMesh, stage: int) -> tuple[float, float]:
    before = built(Partly)()
    pair = Lockstep(mesh, built(Partly), ddp_options={"find_unused_parameters": True}, stage=stage)
    for step in range(5):
        pair.step(rows(10 * step + pair.rank))
    after = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in pair.ours.model.named_parameters()}
    for name in ("first.weight", "unused.weight", "unused.bias"):
        assert torch.equal(after[name], before.get_parameter(name)), f"{name} was trained"
    return pair.errors


@pytest.mark.parametrize("stage", range(4))
def test_frozen_and_unused_parameters(pool: Pool, stage: int) -> None:
    assert_same(pool.run(train_partly, 2, stage))


def freeze_later(mesh: DeviceMesh, stage: int) -> list[bool]:
    model = zgraph.compile(built(Mlp)(), stage=stage, mesh=mesh)
    have = []
    for trains in (True, False, True):
        model.first.weight.requires_grad_(trains)
        model.zero_grad()
        model(*rows(mesh.get_local_rank())).backward()
        assert model.last.weight.grad is not None
        have.append(model.first.weight.grad is not None)
    return have


@SHARDED
def test_a_parameter_may_be_frozen_and_thawed_after_compile(pool: Pool, stage: int) -> None:
    assert pool.run(freeze_later, 2, stage) == [[True, False, True]] * 2


def stage_of(name: str) -> int:
    return {"first": 3, "norm": 0, "last": 1}[name.split(".")[0]] if name != "last.bias" else 2


def mix_stages(mesh: DeviceMesh) -> tuple[float, float]:
    pair = Lockstep(mesh, built(Mlp), stage=stage_of)
    for name, parameter in pair.ours.model.named_parameters():
        assert parameter.placements == ((Shard(0),) if stage_of(name) else (Replicate(),)), name
    for step in range(5):
        pair.step(*(rows(100 * step + 10 * micro + pair.rank) for micro in range(2)), no_sync=bool(step % 2))
    return pair.errors


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_stage_for_each_parameter(pool: Pool, num_ranks: int) -> None:
    assert_same(pool.run(mix_stages, num_ranks))


def build_on_meta(mesh: DeviceMesh, stage: int) -> tuple[list[float], bool, list[float]]:
    """Sums of all parameters, whether they are those of the model built on the CPU, and losses of a few steps."""
    torch.manual_seed(7 + mesh.get_local_rank())
    with torch.device("meta"):
        model = Mlp()
    model = zgraph.compile(model, stage=stage, mesh=mesh)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    torch.manual_seed(7)
    usual = dict(Mlp().named_parameters())
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
    is_usual = all(torch.equal(usual[n], whole[n]) for n in usual)
    sums = [p.double().sum().item() for p in whole.values()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(*rows(mesh.get_local_rank()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sums, is_usual, losses


@pytest.mark.parametrize(("num_ranks", "stage"), [(1, 3), (2, 0), (3, 2), (2, 3)])
def test_a_model_built_on_meta(pool: Pool, num_ranks: int, stage: int) -> None:
    answers = pool.run(build_on_meta, num_ranks, stage)
    for sums, is_usual, losses in answers:
        assert sums == answers[0][0]
        assert is_usual, "the first rank's seed must give the values of a model built on the CPU"
        assert losses[-1] < losses[0]


def build_llama_on_meta(mesh: DeviceMesh, stage: int) -> tuple[float, bool, bool]:
    """The sum of all parameters, whether buffers are as built on the CPU, and whether training brings the loss down."""
    with torch.device("meta"):
        model = zoo.MODELS["llama"]()
    torch.manual_seed(mesh.get_local_rank())
    model = zgraph.compile(model, stage=stage, mesh=mesh)
    usual = dict(zoo.builder("llama")().named_buffers())
    same_buffers = all(torch.equal(b, usual[n]) for n, b in model.named_buffers())
    total = sum(p.full_tensor().double().sum().item() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**zoo.batch("llama", mesh.get_local_rank())).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    usual_start = abs(losses[0] - math.log(zoo.VOCABULARY)) < 0.5
    return total, same_buffers, usual_start and losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("stage", [1, 3])
def test_a_hugging_face_model_built_on_meta(pool: Pool, stage: int) -> None:
    answers = pool.run(build_llama_on_meta, 2, stage)
    assert answers == [(answers[0][0], True, True)] * 2
