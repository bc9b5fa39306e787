"""Any optimizer of torch's trains a sharded model, with schedulers and hooks."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

import zgraph
import zgraph.optim
from zgraph.errors import UsageError

from .lockstep import Lockstep, assert_same
from .nets import Mlp, Odd, built, rows
from .pool import Pool

OPTIMIZERS = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "sgd-for": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, foreach=False),
    "adam": functools.partial(torch.optim.Adam, lr=1e-3),
    "adam-foreach": functools.partial(torch.optim.Adam, lr=1e-3, foreach=True),
    "adam-for": functools.partial(torch.optim.Adam, lr=1e-3, foreach=False),
    "adamw-amsgrad": functools.partial(torch.optim.AdamW, lr=1e-3, amsgrad=True),
    "adamw-fused": functools.partial(torch.optim.AdamW, lr=1e-3, fused=True),
    "flat-adamw": functools.partial(zgraph.optim.AdamW, lr=1e-3),
    "flat-sgd": functools.partial(zgraph.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adagrad": functools.partial(torch.optim.Adagrad, lr=1e-2),
}
CASES = [(name, stage) for i, name in enumerate(OPTIMIZERS) for stage in sorted({3, (1, 2, 0)[i % 3]})]


def optimize(mesh: DeviceMesh, name: str, stage: int) -> tuple[float, float]:
    pair = Lockstep(mesh, built(Odd), OPTIMIZERS[name], stage=stage)
    for step in range(6):
        pair.step(rows(10 * step + pair.rank))
    return pair.errors


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_optimizers(pool: Pool, name: str, stage: int) -> None:
    assert_same(pool.run(optimize, 2, name, stage))


def schedule(mesh: DeviceMesh, stage: int) -> tuple[tuple[float, float], list[float]]:
    pair = Lockstep(mesh, built(Odd), stage=stage)
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(s.optimizer, max_lr=0.02, total_steps=9) for s in pair.sides]
    rates = []
    for step in range(8):
        pair.step(rows(10 * step + pair.rank))
        for scheduler in schedulers:
            scheduler.step()
        rates.append(schedulers[1].get_last_lr()[0])
    return pair.errors, rates


@pytest.mark.parametrize("stage", [1, 3])
def test_learning_rate_scheduler(pool: Pool, stage: int) -> None:
    answers = pool.run(schedule, 2, stage)
    assert_same([errors for errors, _ in answers])
    assert len(set(answers[0][1])) == 8


def groups(mesh: DeviceMesh) -> tuple[float, float]:
    def decay_matrices_only(parameters: object) -> torch.optim.Optimizer:
        listed = list(parameters)  # type: ignore[call-overload]
        return torch.optim.AdamW(
            [
                {"params": [p for p in listed if p.dim() > 1], "weight_decay": 0.5},
                {"params": [p for p in listed if p.dim() <= 1], "weight_decay": 0.0, "lr": 1e-2},
            ],
            lr=1e-3,
        )

    pair = Lockstep(mesh, built(Odd), decay_matrices_only, stage=3)
    for step in range(6):
        pair.step(rows(10 * step + pair.rank))
    return pair.errors


def test_parameter_groups(pool: Pool) -> None:
    assert_same(pool.run(groups, 3))


def hook(mesh: DeviceMesh, stage: int) -> dict[str, list[bool]]:
    """For each parameter, whether its gradient was there, at each run of its hook; the hook then takes it away."""
    model = zgraph.compile(built(Odd)(), stage=stage, mesh=mesh)
    seen: dict[str, list[bool]] = {n: [] for n, _ in model.named_parameters()}

    def take(name: str, parameter: torch.Tensor) -> None:
        seen[name].append(parameter.grad is not None and parameter.grad.shape == parameter.shape)
        parameter.grad = None

    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(functools.partial(take, name))
    for step in range(2):
        model(*rows(step)).backward()
    assert all(p.grad is None for p in model.parameters())
    return seen


@pytest.mark.parametrize("stage", range(4))
def test_post_accumulate_grad_hooks_run(pool: Pool, stage: int) -> None:
    names = [n for n, _ in Odd().named_parameters()]
    assert pool.run(hook, 2, stage) == [{name: [True, True] for name in names}] * 2


class SOAP(torch.optim.SGD):
    """An optimizer of another package, by its name."""


def refused(mesh: DeviceMesh, kind: str) -> str:
    model = zgraph.compile(built(Mlp)(), stage=3, mesh=mesh)
    optimizer = getattr(torch.optim, kind, SOAP)(model.parameters(), lr=0.1)
    before = [p.full_tensor() for p in model.parameters()]

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(*rows(mesh.get_local_rank()))
        loss.backward()
        return loss

    try:
        optimizer.step(closure)
    except UsageError as error:
        assert all(map(torch.equal, before, (p.full_tensor() for p in model.parameters())))
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize("kind", ["Adafactor", "LBFGS", "Rprop", "SparseAdam", "SOAP"])
def test_what_does_not_step_over_shards_is_refused_by_name(pool: Pool, kind: str) -> None:
    for text in pool.run(refused, 2, kind):
        assert f"{kind} does not step over sharded parameters" in text
        assert "stage=0" in text
