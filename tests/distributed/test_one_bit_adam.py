"""Adam whose momentum travels in one bit: as a reference in plain torch, resumed, and far fewer bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh

import zgraph
from tests.deep import deep
from zgraph.bridge.codecs import decode, encode_into
from zgraph.errors import UsageError
from zgraph.ir import DType
from zgraph.ir.codecs import parse_codec

from .pool import Pool

CODEC, FREEZE, DOUBLING, LR, BETAS, EPS, DECAY = "sign(block=64)", 9, 2, 3e-3, (0.9, 0.99), 1e-6, 0.1
UPDATED = [1, 2, 4, 6]
"""Steps that update the variance: two a step, two every second, then every fourth until it is frozen."""


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 35), nn.Tanh(), nn.Linear(35, 5))


def batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(16, 24, generator=torch.Generator().manual_seed(1000 * step + rank))
    return x, torch.stack([x[:, i : i + 4].sum(1).tanh() for i in range(0, 20, 4)], 1)


def step_of(model: Any, optimizer: torch.optim.Optimizer, step: int, rank: int, scale: float = 1.0) -> float:
    x, y = batch(step, rank)
    loss = (model(x) - y).square().mean() * scale
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def made(mesh: DeviceMesh, stage: int) -> tuple[Any, zgraph.optim.OneBitAdam]:
    model = zgraph.compile(net(), mesh=mesh, stage=stage)
    found = zgraph.optim.OneBitAdam(
        model.parameters(), LR, BETAS, EPS, DECAY, codec=CODEC, freeze_step=FREEZE, doubling=DOUBLING
    )
    return model, found


def whole(model: Any) -> torch.Tensor:
    parts = [v.full_tensor() if hasattr(v, "full_tensor") else v for v in model.state_dict().values()]
    return torch.cat([p.reshape(-1) for p in parts])


def trained(mesh: DeviceMesh, stage: int, num_steps: int) -> tuple[torch.Tensor, list[float], int]:
    rows = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("replicate", "shard")) if mesh.size() == 4 else mesh
    model, optimizer = made(rows, stage)
    losses = [step_of(model, optimizer, step, mesh.get_rank()) for step in range(num_steps)]
    return whole(model), losses, optimizer.sent_bytes


def reference(num_ranks: int, num_steps: int) -> torch.Tensor:
    """Parameters in the end: what the ranks do one after the other, in plain torch."""
    model, codec = net(), parse_codec(CODEC)
    parameters = [*model.parameters()]
    numel = sum(p.numel() for p in parameters)
    part = -(-numel // num_ranks)
    momentum, variance = torch.zeros(numel), torch.zeros(numel)
    rests = [torch.zeros(num_ranks, part) for _ in range(num_ranks)]
    part_rests, updates = [torch.zeros(1, part) for _ in range(num_ranks)], 0

    def coded(numbers: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        code = torch.empty(len(numbers), codec.num_bytes(part, DType.f32), dtype=torch.uint8)
        return decode(codec, encode_into(codec, numbers, code, rest), part)

    for step in range(num_steps):
        own = []
        for rank in range(num_ranks):
            x, y = batch(step, rank)
            gradients = torch.autograd.grad((model(x) - y).square().mean(), parameters)
            own.append(torch.cat([g.reshape(-1) for g in gradients]))
        if step + 1 in UPDATED:
            mean = torch.stack([g / num_ranks for g in own]).sum(0)
            momentum = BETAS[0] * momentum + (1 - BETAS[0]) * mean
            variance = BETAS[1] * variance + (1 - BETAS[1]) * mean * mean
            updates += 1
        else:
            sent = []
            for gradient, rest in zip(own, rests, strict=True):
                padded = torch.zeros(num_ranks * part)
                padded[:numel] = BETAS[0] * momentum + (1 - BETAS[0]) * gradient
                sent.append(coded(padded.view(num_ranks, part), rest))
            parts = [coded(torch.stack(sent)[:, r].sum(0, True) / num_ranks, part_rests[r]) for r in range(num_ranks)]
            momentum = torch.cat(parts).reshape(-1)[:numel]
        denominator = (variance / (1 - BETAS[1] ** updates)).sqrt() + EPS
        flat = torch.cat([p.detach().reshape(-1) for p in parameters]) * (1 - LR * DECAY)
        flat = flat - LR / (1 - BETAS[0] ** (step + 1)) * momentum / denominator
        with torch.no_grad():
            for p, new in zip(parameters, torch.split(flat, [p.numel() for p in parameters]), strict=True):
                p.copy_(new.view(p.shape))
    return torch.cat([p.detach().reshape(-1) for p in parameters])


@pytest.mark.parametrize(("stage", "num_ranks"), [(1, 2), deep(0, 2), deep(0, 3), deep(1, 3), deep(1, 4)])
def test_it_is_the_reference(pool: Pool, stage: int, num_ranks: int) -> None:
    wanted = reference(num_ranks, 12)
    for parameters, losses, sent in pool.run(trained, num_ranks, stage, 12):
        torch.testing.assert_close(parameters, wanted, rtol=1e-4, atol=2e-5)
        assert losses[-1] < losses[0]
        numel = len(wanted)
        assert 0 < sent < (12 - len(UPDATED)) * 8 * numel / 20, "20 times less than an all-reduce in fp32"


def resumed_and_skipped(mesh: DeviceMesh, stage: int) -> tuple[list[float], list[float], int, bool, list[str]]:
    """Losses of a run that goes on and of one that loads its state; steps that were skipped; refusals."""
    rank, runs = mesh.get_rank(), []
    model, optimizer = made(mesh, stage)
    for step in range(6):
        step_of(model, optimizer, step, rank)
    before = whole(model).clone()
    step_of(model, optimizer, 6, rank, scale=float("nan") if rank == 1 else 1.0)
    is_same = torch.equal(before, whole(model))
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    saved = optimizer.state_dict()
    runs.append([step_of(model, optimizer, step, rank) for step in range(7, 10)])
    skipped = optimizer.skipped
    model, optimizer = made(mesh, stage)
    model.load_state_dict(state)
    optimizer.load_state_dict(saved)
    runs.append([step_of(model, optimizer, step, rank) for step in range(7, 10)])
    said = []
    for wrong in (lambda: zgraph.optim.OneBitAdam(nn.Linear(2, 2).parameters()), lambda: made(mesh, 2)):
        try:
            wrong()
        except UsageError as error:
            said.append(str(error))
    return runs[0], runs[1], skipped, is_same, said


@pytest.mark.parametrize("stage", [1, deep(0)])
def test_it_goes_on_from_its_state_and_skips_what_is_not_finite(pool: Pool, stage: int) -> None:
    for went_on, again, skipped, is_same, said in pool.run(resumed_and_skipped, 2, stage):
        assert went_on == again
        assert (skipped, is_same) == (1, True)
        assert "call zgraph.compile" in said[0]
        assert "compile with stage=1" in said[1]


def test_the_variance_is_updated_ever_more_seldom() -> None:
    model = zgraph.compile(net())
    optimizer = zgraph.optim.OneBitAdam(model.parameters(), freeze_step=FREEZE, doubling=DOUBLING)
    assert [step for step in range(1, 20) if optimizer.updates_variance(step)] == UPDATED
    optimizer = zgraph.optim.OneBitAdam(model.parameters(), freeze_step=5, doubling=0)
    assert [step for step in range(1, 20) if optimizer.updates_variance(step)] == [1, 2, 3, 4, 5]
    with pytest.raises(UsageError, match="all groups at once"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


def rows_without_gradient(mesh: DeviceMesh, stage: int) -> tuple[bool, bool, bool]:
    """Whether rows of no batch stay, whether one first seen once the variance is frozen stays, whether others move."""
    torch.manual_seed(0)
    model = zgraph.compile(nn.Sequential(nn.Embedding(12, 8, padding_idx=0), nn.Linear(8, 3)), mesh=mesh, stage=stage)
    optimizer = zgraph.optim.OneBitAdam(model.parameters(), LR, BETAS, codec=CODEC, freeze_step=2, doubling=0)
    before = whole(model)[: 12 * 8].view(12, 8).clone()
    for step in range(6):
        ids = torch.tensor([0, 1, 2, 3] if step < 2 else [0, 2, 3, 7]) + mesh.get_rank() % 2 * torch.tensor(
            [0, 1, 1, 0]
        )
        model(ids).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = (whole(model)[: 12 * 8].view(12, 8) - before).abs().amax(1)
    return bool((moved[[0, 8, 9, 10, 11]] == 0).all()), float(moved[7]) == 0, bool((moved[1:4] > 0).all())


def test_what_has_no_variance_keeps_its_value(pool: Pool) -> None:
    for stage in (0, 1):
        assert pool.run(rows_without_gradient, 2, stage) == [(True, True, True)] * 2


def test_states_keep_their_dtypes_and_to_ask_for_them_changes_nothing() -> None:
    def fresh() -> tuple[Any, zgraph.optim.OneBitAdam]:
        model = zgraph.compile(net().bfloat16(), stage=1)
        return model, zgraph.optim.OneBitAdam(model.parameters(), LR, BETAS, codec=CODEC, doubling=0)

    def kept(optimizer: zgraph.optim.OneBitAdam) -> list[torch.Tensor]:
        steps = torch.tensor([optimizer.num_steps, optimizer.num_updates, optimizer.skipped])
        return [
            steps,
            optimizer._momentum.clone(),
            optimizer._has_variance.clone(),
            *map(torch.clone, optimizer._variances),
        ]

    model, optimizer = fresh()
    for step in range(2):
        before = [whole(model).clone(), *kept(optimizer)]
        get_optimizer_state_dict(model, optimizer)
        assert all(map(torch.equal, before, [whole(model), *kept(optimizer)]))
        model(batch(step, 0)[0].bfloat16()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.num_steps = optimizer.num_updates = 301  # no number of bfloat16
    _, other = fresh()
    other.load_state_dict(optimizer.state_dict())
    assert all(map(torch.equal, kept(optimizer), kept(other)))
