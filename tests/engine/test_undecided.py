"""A step that the device leaves out by itself: as if the host had looked first. The processor stands for the device."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import zgraph
from zgraph.engine.engine import Engine
from zgraph.engine.gradients import multiply
from zgraph.engine.undecided import Later

OVERFLOWS = {2, 3}
STEPS = 6


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))


def made(**keys: Any) -> Engine:
    torch.manual_seed(0)
    engine, *_ = zgraph.initialize_engine(
        model=Net(),
        config={
            "train_micro_batch_size_per_gpu": 4,
            "zero_optimization": {"stage": 1},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5, "warmup_max_lr": 1e-2}},
            "gradient_clipping": 0.1,
            **keys,
        },
    )
    return engine


def train(engine: Engine, *, asks: bool) -> tuple[Any, ...]:
    """Parameters, moments, rates and counts after steps of which some overflow."""
    applied, rates = [], []
    for step in range(STEPS):
        torch.manual_seed(step)
        loss = engine(torch.randn(4, 6)).square().mean()
        engine.backward(loss * (float("inf") if step in OVERFLOWS else 1.0))
        engine.step()
        if asks:
            applied.append(engine.was_step_applied())
            rates.append(engine.get_lr()[0])
    assert engine.optimizer is not None
    states = [s[k].clone() for s in engine.optimizer.state.values() for k in ("exp_avg", "exp_avg_sq", "step")]
    parameters = [p.detach().clone() for p in engine.module.parameters()]
    return parameters + states, engine.skipped_steps, engine.get_lr(), engine.global_steps, applied, rates


@pytest.mark.parametrize("asks", [True, False])
def test_a_step_that_the_device_leaves_out(
    asks: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = train(made(), asks=asks)
    caplog.clear()
    looked = []
    monkeypatch.setattr(Engine, "_is_left_to", lambda self, device: True)
    monkeypatch.setattr(Later, "__float__", lambda self: looked.append(1) or float(self._number))
    with caplog.at_level(logging.WARNING, "zgraph"):
        found = train(made(), asks=asks)
    for ours, theirs in zip(found[0], expected[0], strict=True):
        assert torch.equal(ours, theirs)
    assert found[1:] == expected[1:]
    assert found[1] == len(OVERFLOWS)
    assert [r.getMessage().split(" is ")[0] for r in caplog.records] == [f"step {step + 1}" for step in OVERFLOWS]


def test_nobody_looks_before_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = made()
    monkeypatch.setattr(Engine, "_is_left_to", lambda self, device: True)
    looked: list[int] = []
    monkeypatch.setattr(Later, "__float__", lambda self: looked.append(1) or float(self._number))
    for step in range(3):
        engine.backward(engine(torch.ones(4, 6)).square().mean())
        engine.step()
        assert len(looked) == step, "only what the step before has made"
    assert engine.get_global_grad_norm() is not None


def left_to_the_device(engine: Engine, factor: float) -> None:
    engine.backward(engine(torch.ones(4, 6)).square().mean() * factor)
    engine.step()


def test_what_the_script_sets_after_a_step_that_is_left_out_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "_is_left_to", lambda self, device: True)
    engine = made()
    left_to_the_device(engine, 1.0)
    assert engine.optimizer is not None
    (group,) = engine.optimizer.param_groups
    before = group["lr"], engine.lr_scheduler.state_dict()
    left_to_the_device(engine, float("inf"))
    assert group["lr"] != before[0], "the host goes on as if the step counted"
    group["weight_decay"] = 0.25
    assert not engine.was_step_applied()
    assert (group["lr"], engine.lr_scheduler.state_dict()) == before
    assert group["weight_decay"] == 0.25
    left_to_the_device(engine, float("inf"))
    group["lr"] = 0.125
    engine.destroy()
    assert group["lr"] == 0.125
    assert engine.lr_scheduler.state_dict() == before[1], "it was taken back as the engine ended"


def test_a_scheduler_that_cannot_go_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counts:
        steps = 0

        def step(self) -> None:
            self.steps += 1

    monkeypatch.setattr(Engine, "_is_left_to", lambda self, device: True)
    engine = made()
    engine.lr_scheduler = Counts()
    for factor in (1.0, float("inf"), 1.0):
        left_to_the_device(engine, factor)
    assert engine.lr_scheduler.steps == 2
    assert engine.skipped_steps == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_factor_that_the_host_does_not_know(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    factor = torch.tensor(0.1234567891, dtype=torch.float64)
    gradients = [torch.randn(17, 3).to(dtype), torch.randn(5).to(dtype)]
    computed = torch.promote_types(dtype, torch.float32)
    expected = [(g.to(computed) * float(factor)).to(dtype) for g in gradients]
    multiply(gradients, factor)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_loss_is_written_with_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}}
    engine, losses = made(**keys), []
    elsewhere = SimpleNamespace(device=torch.device("meta"), num_ranks=1)  # the model itself stays on the processor
    monkeypatch.setattr(engine.monitor, "session", elsewhere)

    def rows() -> list[list[str]]:
        path = tmp_path / "job" / "Train_Samples_train_loss.csv"
        return list(csv.reader(path.open()))[1:] if path.exists() else []

    for step in range(3):
        loss = engine(torch.ones(4, 6)).square().mean()
        engine.monitor.losses.append(loss.detach())
        losses.append(loss.item())
        engine.global_steps += 1
        engine.monitor.after_step(engine)
        assert len(rows()) == step
    engine.destroy()
    assert [float(row[1]) for row in rows()] == pytest.approx(losses)
    assert [int(row[0]) for row in rows()] == [4, 8, 12]
