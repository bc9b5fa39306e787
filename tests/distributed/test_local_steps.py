"""Replicas that train apart: their outer steps are DiLoCo's, whatever shards, codes and delays are between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

import zgraph
from tests.deep import deep
from zgraph.optim import LocalSteps, Nesterov

from .pool import JobError, Pool


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 33), nn.Tanh(), nn.Linear(33, 33), nn.Tanh(), nn.Linear(33, 1))


def batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1000 * step + rank))
    return x, x.sum(1, keepdim=True).tanh()


def step_of(model: Any, optimizer: torch.optim.Optimizer, step: int, rank: int) -> float:
    x, y = batch(step, rank)
    loss = (model(x) - y).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def digest(model: nn.Module) -> list[float]:
    return [float(whole(p).double().sum()) for p in model.parameters()]


def replica(
    mesh: DeviceMesh, num_inner: int, stage: int = 3, lr: float = 1e-2, **options: Any
) -> tuple[nn.Module, torch.optim.Optimizer, LocalSteps]:
    """This rank's part of a replica, and its local steps. A replica of one rank is a plain module."""
    model, outer = net(), mesh
    if num_inner > 1:
        ranks = DeviceMesh("cpu", mesh.mesh.view(-1, num_inner), mesh_dim_names=("outer", "inner"))
        model, outer = zgraph.compile(model, stage=stage, mesh=ranks["inner"]), ranks["outer"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    return model, optimizer, zgraph.local_steps(model, optimizer, outer, **options)


def trained(mesh: DeviceMesh, num_inner: int, stage: int, steps: int, options: dict[str, Any]) -> list[float]:
    model, optimizer, outer = replica(mesh, num_inner, stage, **options)
    for step in range(steps):
        step_of(model, optimizer, step, mesh.get_rank())
    outer.synchronise()
    outer.synchronise()  # nothing has moved
    outer.state_dict()
    return digest(model)


def reference(num_replicas: int, num_inner: int, steps: int, every: int, outer: Nesterov) -> list[float]:
    """DiLoCo in plain torch, in one process."""
    models = [net() for _ in range(num_replicas)]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in models]
    begin = [p.detach().clone() for p in models[0].parameters()]
    momentum = [torch.zeros_like(p) for p in begin]
    for step in range(steps):
        for number, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            for rank in range(number * num_inner, (number + 1) * num_inner):
                x, y = batch(step, rank)
                ((model(x) - y).square().mean() / num_inner).backward()
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % every == 0 or step + 1 == steps:
            for i, (p, m) in enumerate(zip(begin, momentum, strict=True)):
                mean = torch.stack([p - list(one.parameters())[i].detach() for one in models]).mean(0)
                m.mul_(outer.momentum).add_(mean)
                p.sub_(outer.lr * (mean + outer.momentum * m))
                for one in models:
                    list(one.parameters())[i].data.copy_(p)
    return [float(p.double().sum()) for p in begin]


@pytest.mark.parametrize(
    ("num_replicas", "num_inner", "stage", "steps"),
    [(2, 1, 3, 8), (2, 2, 3, 10), deep(3, 1, 2, 10), deep(2, 2, 0, 10), deep(2, 2, 1, 8)],
)
def test_it_is_diloco(pool: Pool, num_replicas: int, num_inner: int, stage: int, steps: int) -> None:
    options = {"every": 4, "outer": Nesterov(0.7, 0.9), "codec": None}
    found = pool.run(trained, num_replicas * num_inner, num_inner, stage, steps, options)
    assert all(one == found[0] for one in found)
    assert found[0] == pytest.approx(reference(num_replicas, num_inner, steps, 4, Nesterov(0.7, 0.9)), abs=2e-5)


def averaged(mesh: DeviceMesh) -> tuple[list[float], list[float]]:
    """One outer step of rate 1 without momentum, beside the mean of the parameters."""
    model, optimizer, outer = replica(mesh, 1, every=3, outer=Nesterov(1.0, 0.0), codec=None, fragments=3, delay=2)
    for step in range(2):
        step_of(model, optimizer, step, mesh.get_rank())
    means = []
    outer.synchronise()
    for p in model.parameters():
        held = whole(p).clone()
        torch.distributed.all_reduce(held, group=mesh.get_group())
        means.append(float(held.double().sum()) / mesh.size())
    return digest(model), means


def test_replicas_are_alike_after_it(pool: Pool) -> None:
    for found, means in pool.run(averaged, 3):
        assert found == pytest.approx(means, abs=1e-6)


def losses(mesh: DeviceMesh, steps: int, options: dict[str, Any]) -> tuple[float, int, list[float]]:
    """The mean loss of the last ten steps, bytes sent to other replicas, and what the parameters add up to."""
    model, optimizer, outer = replica(mesh, 1, **options)
    found = [step_of(model, optimizer, step, mesh.get_rank()) for step in range(steps)]
    outer.synchronise()
    return sum(found[-10:]) / 10, outer.sent_bytes, digest(model)


@pytest.mark.parametrize(
    "options",
    [
        {"codec": "q4"},
        {"codec": "q8", "fragments": 4, "delay": 3},
        deep({"codec": "topk(5%)"}),
        deep({"codec": "sign", "fragments": 2}),
        deep({"codec": "q8", "delay": 9}),
    ],
    ids=str,
)
def test_codes_fragments_and_delays_train_as_well(pool: Pool, options: dict[str, Any]) -> None:
    plain = pool.run(losses, 2, 60, {"every": 10, "codec": None})
    coded = pool.run(losses, 2, 60, {"every": 10, **options})
    assert coded[0][2] == coded[1][2], "replicas are alike at the end, to the last bit"
    for (loss, sent, _), (its, its_sent, _) in zip(plain, coded, strict=True):
        assert abs(its - loss) < 0.05
        assert its_sent < 0.4 * sent


def resumed(mesh: DeviceMesh) -> tuple[list[float], list[float]]:
    """Parameters of a run, and of one that was ended at half of it and went on from what was saved."""

    def go(begin: int, end: int, model: Any, optimizer: Any) -> None:
        for step in range(begin, end):
            step_of(model, optimizer, step, mesh.get_rank())

    options: dict[str, Any] = {"every": 4, "codec": "q4(block=64)", "fragments": 2, "delay": 1}
    model, optimizer, outer = replica(mesh, 2, **options)
    go(0, 7, model, optimizer)
    with pytest.raises(zgraph.errors.StateDictError, match="synchronise"):
        outer.state_dict()
    outer.synchronise()
    kept = outer.state_dict()
    saved = {k: v.clone() for k, v in model.state_dict().items()}
    states = optimizer.state_dict()
    other, its_optimizer, its_outer = replica(mesh, 2, **options)
    other.load_state_dict(saved)
    its_optimizer.load_state_dict({**states, "state": {k: _cloned(v) for k, v in states["state"].items()}})
    its_outer.load_state_dict({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in kept.items()})
    for one, its, handle in ((model, optimizer, outer), (other, its_optimizer, its_outer)):
        go(7, 13, one, its)
        handle.synchronise()
    return digest(model), digest(other)


def _cloned(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in state.items()}


def test_a_run_goes_on_from_what_it_saved(pool: Pool) -> None:
    for found, other in pool.run(resumed, 4):
        assert found == other


def poisoned_shard(mesh: DeviceMesh) -> tuple[int, list[float]]:
    """The same of replicas of two ranks, where a single shard of one is not finite."""
    ranks = DeviceMesh("cpu", mesh.mesh.view(-1, 2), mesh_dim_names=("outer", "inner"))
    model = zgraph.compile(net(), stage=3, mesh=ranks["inner"])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    outer = zgraph.local_steps(model, optimizer, ranks["outer"], every=2, codec="q8")
    for step in range(3):
        step_of(model, optimizer, step, mesh.get_rank())
    if mesh.get_rank() == 1:
        with torch.no_grad():
            next(iter(model.parameters())).to_local().fill_(float("inf"))  # type: ignore[attr-defined]
    outer.synchronise()
    return outer.skipped, digest(model)


def test_all_ranks_of_a_replica_go_back(pool: Pool) -> None:
    found = pool.run(poisoned_shard, 4)
    assert all(one == found[0] for one in found)
    skipped, last = found[0]
    assert skipped == 1
    assert all(torch.tensor(last).isfinite())


def poisoned(mesh: DeviceMesh) -> tuple[int, bool, list[float]]:
    """Outer steps left out, whether the first took all back, and the parameters at the end."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    outer = zgraph.local_steps(model, optimizer, mesh, every=2, codec="q8")
    before = digest(model)
    step_of(model, optimizer, 0, mesh.get_rank())
    if mesh.get_rank() == 1:
        with torch.no_grad():
            next(iter(model.parameters())).fill_(float("inf"))
    step_of(model, optimizer, 1, mesh.get_rank())
    again = digest(model) == before
    step_of(model, optimizer, 2, mesh.get_rank())
    outer.synchronise()
    return outer.skipped, again, digest(model)


def test_a_replica_that_is_not_finite_is_taken_back(pool: Pool) -> None:
    found = pool.run(poisoned, 2)
    assert found[0] == found[1]
    skipped, again, last = found[0]
    assert skipped == 1
    assert again
    assert all(torch.tensor(last).isfinite())


def in_low_precision(mesh: DeviceMesh) -> tuple[float, float]:
    """The output of a model in bf16 after an outer step, and that of one that holds its parameters."""
    ranks = DeviceMesh("cpu", mesh.mesh.view(-1, 2), mesh_dim_names=("outer", "inner"))
    model = zgraph.compile(net(), stage=3, mesh=ranks["inner"], param_dtype="bf16")
    optimizer = zgraph.optim.AdamW(model.parameters(), lr=1e-2)
    zgraph.local_steps(model, optimizer, ranks["outer"], every=1, codec=None)
    for step in range(2):
        step_of(model, optimizer, step, mesh.get_rank())
    other = net()
    other.load_state_dict({k: whole(v) for k, v in model.state_dict().items()})
    x, _ = batch(5, 0)
    return float(model(x).float().sum()), float(other.bfloat16()(x.bfloat16()).float().sum())


def test_copies_to_compute_with_are_made_anew(pool: Pool) -> None:
    for found, other in pool.run(in_low_precision, 4):
        assert found == pytest.approx(other, rel=1e-2)


def refused(mesh: DeviceMesh, differs: dict[str, Any], options: dict[str, Any]) -> str:
    if mesh.get_rank() == 1:
        options = {**options, **differs}
    try:
        replica(mesh, 1, **options)
    except zgraph.errors.UsageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"every": 0}, "every must be"),
        ({"every": 4, "delay": 4}, "must be less than every"),
        ({"every": 2, "fragments": 3}, "take turns within"),
        ({"every": 2, "codec": "q9"}, "no codec called q9"),
        ({"every": 2, "codec": 3}, "must be a codec"),
    ],
    ids=str,
)
def test_options_that_mean_nothing_are_refused(pool: Pool, options: dict[str, Any], said: str) -> None:
    assert all(said in found for found in pool.run(refused, 2, {}, options))


def test_replicas_that_disagree_are_told_so(pool: Pool) -> None:
    assert all("every=9" in said and "rank 1" in said for said in pool.run(refused, 2, {"every": 9}, {"every": 4}))
    assert all("must be less" in said for said in pool.run(refused, 2, {"delay": 9}, {"every": 4}))


def left_alone(mesh: DeviceMesh) -> str:
    model, optimizer, _ = replica(mesh, 1, every=2)
    step_of(model, optimizer, 0, mesh.get_rank())
    if mesh.get_rank() == 1:
        import os

        os._exit(7)
    try:
        step_of(model, optimizer, 1, mesh.get_rank())
    except zgraph.errors.PeerError as error:
        raise AssertionError(f"told: {error}") from None
    return "nothing was told"


def test_a_replica_that_is_gone_is_told(pool: Pool) -> None:
    with pytest.raises(JobError, match="told: outer step after step 2: another replica is gone"):
        pool.run(left_alone, 2)
