"""The engine on several ranks: the losses and gradient norms of plain training on the whole batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

import zgraph
from zgraph.errors import UsageError

from .nets import Mlp, Odd, built, rows
from .pool import Pool

MICRO, ACCUMULATION, STEPS, CLIP = 6, 2, 6, 0.05

OPTIMIZERS = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=1e-2),
}

PARAMS = {
    "AdamW": {"lr": 1e-2, "weight_decay": 0.1},
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "Adagrad": {"lr": 1e-2},
}


def engine_of(mesh: DeviceMesh, model: torch.nn.Module, stage: int, name: str = "AdamW", **keys: Any) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": name, "params": PARAMS[name]},
        **keys,
    }
    return zgraph.initialize_engine(model=model, config=config, mesh=mesh)[0]


def batches(step: int, num_ranks: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Those of one step: a micro-batch of each rank, one after the other."""
    return [rows(100 * step + i, MICRO) for i in range(ACCUMULATION * num_ranks)]


def trained(mesh: DeviceMesh, stage: int, name: str) -> tuple[float, float]:
    """How far losses and gradient norms of the engine are from those of plain training, at most."""
    engine = engine_of(mesh, built(Odd)(), stage, name)
    plain = built(Odd)()
    optimizer = OPTIMIZERS[name](plain.parameters())
    rank, ranks = mesh.get_local_rank(), mesh.size()
    of_losses, of_norms = [], []
    for step in range(STEPS):
        whole = batches(step, ranks)
        losses = [plain(*batch) for batch in whole]
        (sum(losses) / len(losses)).backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        for micro in range(ACCUMULATION):
            at = micro * ranks + rank
            loss = engine(*whole[at])
            engine.backward(loss)
            engine.step()
            of_losses.append(abs(loss.item() - losses[at].item()))
        of_norms.append(abs(engine.get_global_grad_norm() - norm.item()))
    assert engine.global_steps == STEPS
    return max(of_losses), max(of_norms)


@pytest.mark.parametrize(
    ("stage", "name"), [(0, "AdamW"), (1, "SGD"), (2, "Adagrad"), (3, "AdamW"), (3, "SGD"), (1, "AdamW"), (2, "AdamW")]
)
def test_losses_and_gradient_norms_are_those_of_plain_training(pool: Pool, stage: int, name: str) -> None:
    for of_losses, of_norms in pool.run(trained, 2, stage, name):
        assert of_losses < 1e-5
        assert of_norms < 1e-5


def with_ones_own(mesh: DeviceMesh, stage: int) -> tuple[bool, bool]:
    """Whether an optimizer that was made before has the sharded parameters, and changes them."""
    model = built(Odd)()
    mine = torch.optim.SGD(model.parameters(), lr=0.1)
    config = {"train_micro_batch_size_per_gpu": MICRO, "zero_optimization": {"stage": stage}}
    engine = zgraph.initialize_engine(model=model, optimizer=mine, config=config, mesh=mesh)[0]
    weight = engine.module.first.weight
    before = weight.to_local().clone()
    engine.backward(engine(*rows(mesh.get_local_rank(), MICRO)))
    engine.step()
    ours = {id(p) for g in mine.param_groups for p in g["params"]}
    return ours == {id(p) for p in engine.module.parameters()}, not torch.equal(before, weight.to_local())


@pytest.mark.parametrize("stage", [1, 3])
def test_an_optimizer_made_before(pool: Pool, stage: int) -> None:
    assert pool.run(with_ones_own, 2, stage) == [(True, True)] * 2


def overflowing(mesh: DeviceMesh) -> tuple[list[float], list[int], bool]:
    """Loss scales and skipped steps where one rank's second step overflows; whether that step changed anything."""
    keys = {"fp16": {"enabled": True, "initial_scale_power": 8, "hysteresis": 1, "loss_scale_window": 2}}
    engine = engine_of(mesh, built(Mlp)(), 3, gradient_accumulation_steps=1, **keys)
    scales, skipped = [], []
    unchanged = False
    for step in range(5):
        x, y = rows(step, MICRO)
        if step == 1 and mesh.get_local_rank() == 1:
            x = x * 1e9
        before = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
        engine.backward(engine(x, y))
        engine.step()
        if step == 1:
            unchanged = all(
                torch.equal(p.to_local(), before[n].to_local()) for n, p in engine.module.named_parameters()
            )
        scales.append(engine.cur_scale)
        skipped.append(engine.skipped_steps)
    return scales, skipped, unchanged


def test_an_overflow_on_one_rank_skips_the_step_on_all(pool: Pool) -> None:
    for scales, skipped, unchanged in pool.run(overflowing, 2):
        assert scales == [256, 128, 128, 128, 256]
        assert skipped == [0, 1, 1, 1, 1]
        assert unchanged


def not_finite(mesh: DeviceMesh, stage: int, keys: dict[str, Any]) -> tuple[int, bool, bool]:
    """After an infinite loss of one rank: skipped steps, whether it was applied, whether parameters are finite."""
    engine = engine_of(mesh, built(Mlp)(), stage, gradient_accumulation_steps=1, **keys)
    x, y = rows(0, MICRO)
    engine.backward(engine(x * math.inf if mesh.get_local_rank() else x, y))
    engine.step()
    finite = all(p.detach().isfinite().all().item() for p in locals_of(engine))
    return engine.skipped_steps, engine.was_step_applied(), finite


def locals_of(engine: Any) -> list[torch.Tensor]:
    return [p.to_local() if hasattr(p, "to_local") else p for p in engine.module.parameters()]


@pytest.mark.parametrize(
    ("stage", "keys", "skips"),
    [
        (0, {"bf16": {"enabled": True}}, True),
        (3, {"bf16": {"enabled": True}}, True),
        (2, {"bf16": {"enabled": True, "check_grad_overflow": False}}, False),
        (1, {}, True),
        (0, {}, False),
    ],
)
def test_gradients_that_are_not_finite_skip_the_step(pool: Pool, stage: int, keys: Any, skips: bool) -> None:
    assert pool.run(not_finite, 2, stage, keys) == [(int(skips), not skips, skips)] * 2


def in_half(mesh: DeviceMesh, dtype: str) -> list[float]:
    engine = engine_of(mesh, built(Mlp)(), 2, gradient_accumulation_steps=1, **{dtype: {"enabled": True}})
    losses = []
    for _ in range(12):
        loss = engine(*rows(mesh.get_local_rank(), MICRO))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert all(p.dtype == torch.float32 for p in engine.module.parameters())
    return losses


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_learns(pool: Pool, dtype: str) -> None:
    for losses in pool.run(in_half, 2, dtype):
        assert all(map(math.isfinite, losses))
        assert losses[-1] < losses[0]


def muon(mesh: DeviceMesh, stage: int) -> float:
    """How far parameters are from plain training, the hidden layer's matrix by torch's Muon, the others by AdamW."""
    config = {
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "Muon", "params": {"lr": 0.02, "adam_lr": 1e-3}},
    }
    plain = built(Mlp)()
    engine = zgraph.initialize_engine(model=built(Mlp)(), config=config, mesh=mesh)[0]
    matrix = plain.first.weight
    rest = [p for p in plain.parameters() if p is not matrix]
    optimizers = torch.optim.Muon([matrix], lr=0.02), torch.optim.AdamW(rest, lr=1e-3, weight_decay=0.1)
    for step in range(3):
        whole = [rows(10 * step + rank, MICRO) for rank in range(mesh.size())]
        (sum(plain(*batch) for batch in whole) / len(whole)).backward()
        for optimizer in optimizers:
            optimizer.step()
        plain.zero_grad()
        engine.backward(engine(*whole[mesh.get_local_rank()]))
        engine.step()
        engine.module.zero_grad()
    ours = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in engine.module.named_parameters()}
    return max(float((ours[n] - p).abs().max()) for n, p in plain.named_parameters())


@pytest.mark.parametrize("stage", [0, 3])
def test_muon(pool: Pool, stage: int) -> None:
    assert max(pool.run(muon, 2, stage)) < 1e-2  # torch's multiplies in bf16


def refused(mesh: DeviceMesh) -> list[str]:
    said = []
    engine = engine_of(mesh, built(Mlp)(), 1)
    for act in (
        lambda: engine.backward(torch.ones(2)),
        lambda: engine.backward(torch.ones(()), retain_graph=True),
        lambda: engine.set_train_batch_size(MICRO * mesh.size() + 1),
        lambda: zgraph.initialize_engine(model=built(Mlp)()),
        lambda: zgraph.initialize_engine(config={}),
    ):
        with pytest.raises(UsageError) as caught:
            act()
        said.append(str(caught.value))
    engine.set_train_batch_size(MICRO * mesh.size() * 4)
    assert engine.gradient_accumulation_steps() == 4
    return said


def test_what_is_refused(pool: Pool) -> None:
    said = pool.run(refused, 2)[0]
    for message, part in zip(
        said, ("one number", "retain_graph", "a multiple of 12", "config=", "model="), strict=True
    ):
        assert part in message
