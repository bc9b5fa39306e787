"""The engine on one rank, as a script with DeepSpeed's calls uses it."""

import argparse
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

import zgraph
from zgraph.errors import UsageError
from zgraph.optim import elastic

CONFIG = {"train_batch_size": 8, "zero_optimization": {"stage": 3}, "optimizer": {"type": "AdamW"}}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def steps(engine, loader):
    losses = []
    for (rows,) in loader:
        loss = engine(rows.to(engine.device)).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


@pytest.fixture
def data():
    return TensorDataset(torch.randn(24, 4, generator=torch.Generator().manual_seed(1)))


def test_the_line_of_the_readme_runs():
    config = {"train_batch_size": 256, "zero_optimization": {"stage": 3}, "optimizer": {"type": "AdamW"}}
    engine, optimizer, loader, scheduler = zgraph.initialize_engine(model=net(), config=config)
    assert engine.train_batch_size() == engine.train_micro_batch_size_per_gpu() == 256
    assert isinstance(optimizer, zgraph.optim.AdamW)
    assert engine.zero_optimization_stage() == 3
    assert loader is scheduler is None
    assert engine.module is not None
    assert [*engine.state_dict()] == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_a_script_with_deepspeeds_arguments(tmp_path, data):
    (tmp_path / "ds.json").write_text(json.dumps(CONFIG))
    parser = zgraph.add_config_arguments(argparse.ArgumentParser())
    args = parser.parse_args(["--deepspeed", "--deepspeed_config", str(tmp_path / "ds.json")])
    model = net()
    engine, *_ = zgraph.initialize(
        args=args, model=model, model_parameters=model.parameters(), training_data=data, collate_fn=None
    )
    losses = steps(engine, engine.training_dataloader)
    assert len(losses) == engine.global_steps == 3
    assert engine.global_samples == 24


def test_an_optimizer_and_a_scheduler_of_ones_own(data):
    model = net()
    mine = torch.optim.SGD([{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters()}], lr=0.2)
    config = {"train_batch_size": 8, "zero_optimization": {"stage": 2}}
    engine, optimizer, loader, scheduler = zgraph.initialize(
        model=model,
        optimizer=mine,
        training_data=data,
        config=config,
        lr_scheduler=lambda made: torch.optim.lr_scheduler.StepLR(made, 1, 0.5),
    )
    assert optimizer is mine
    steps(engine, loader)
    assert engine.get_lr() == [0.1 / 8, 0.2 / 8]
    assert scheduler.get_last_lr() == engine.get_lr()
    assert {id(p) for g in mine.param_groups for p in g["params"]} == {id(p) for p in engine.module.parameters()}


def test_accumulation_is_one_step_of_the_whole_batch(data):
    def losses(**keys):
        config = {**CONFIG, "train_batch_size": 24, **keys, "gradient_clipping": 0.1}
        engine, _, loader, _ = zgraph.initialize(model=net(), training_data=data, config=config)
        for _ in range(3):
            steps(engine, loader)
        assert engine.global_steps == 3
        return [p.detach().clone() for p in engine.module.parameters()]

    for whole, parts in zip(losses(), losses(gradient_accumulation_steps=4), strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-6)


def test_the_mean_over_replicas_is_taken_before_gradients_are_clipped(data, monkeypatch):
    config = {**CONFIG, "train_batch_size": 16, "train_micro_batch_size_per_gpu": 8, "gradient_clipping": 1e-3}
    engine, optimizer, loader, _ = zgraph.initialize(model=net(), training_data=data, config=config)
    norms = []

    class Run:
        has_taken = True

        def reduce(self):
            norms.append(max(p.grad.norm().item() for p in engine.module.parameters()))

    run = Run()
    monkeypatch.setitem(elastic._RUNS, optimizer, lambda: run)
    steps(engine, loader)
    assert len(norms) == engine.global_steps > 0
    assert min(norms) > 2e-3


@pytest.mark.parametrize("has_taken", [True, False])
def test_a_step_that_does_not_count_is_not_copied(data, tmp_path, monkeypatch, has_taken):
    memory = {"every": 1, "job": "one", "folder": str(tmp_path)}
    engine, optimizer, loader, _ = zgraph.initialize(
        model=net(), training_data=data, config={**CONFIG, "checkpoint": {"memory": memory}}
    )
    run = SimpleNamespace(reduce=lambda: None, has_taken=has_taken)
    monkeypatch.setitem(elastic._RUNS, optimizer, lambda: run)
    steps(engine, loader)
    engine._checkpoints.copies.wait()
    assert bool([*tmp_path.rglob("state.json")]) == has_taken
    engine.destroy()


def test_every_way_to_make_the_gradients_of_a_step(data):
    def trained(train):
        config = {**CONFIG, "train_batch_size": 16, "train_micro_batch_size_per_gpu": 8, "gradient_clipping": 0.1}
        engine = zgraph.initialize(model=net(), config=config)[0]
        losses = [engine(rows).square().mean() for rows in (data.tensors[0][:8], data.tensors[0][8:16])]
        train(engine, losses)
        assert (engine.global_steps, engine.was_step_applied()) == (1, True)
        return [p.detach().clone() for p in engine.module.parameters()]

    def counted(engine, losses):
        for loss, is_last in zip(losses, (False, True), strict=True):
            assert engine.backward(loss).item() == loss.item() / 2
            engine.step()
            assert engine.was_step_applied() is is_last

    def by_hand(engine, losses):
        for loss in losses:
            engine.scale(loss).backward()
            engine.step()

    def said(engine, losses):
        engine.set_gradient_accumulation_boundary(False)
        engine.backward(losses[0] / 2, scale_wrt_gas=False)
        engine.set_gradient_accumulation_boundary(True)
        engine.backward(losses[1] / 2, scale_wrt_gas=False)
        engine.step()

    wanted = trained(counted)
    for way in (by_hand, said):
        assert all(map(torch.equal, trained(way), wanted))

    def without_share(engine, losses):
        losses[0].backward()
        engine.step()

    with pytest.raises(UsageError, match=r"engine.scale\(loss\)"):
        trained(without_share)


def test_no_optimizer_is_inference():
    engine, optimizer, _, _ = zgraph.initialize(model=net(), config={"train_batch_size": 1})
    assert optimizer is None
    engine.eval()
    with torch.no_grad():
        assert engine(torch.ones(1, 4)).shape == (1, 1)
    with pytest.raises(UsageError, match="needs an optimizer"):
        engine.backward(engine(torch.ones(1, 4)).sum())


def test_the_loader_goes_on_where_it_was(data):
    def loader():
        return zgraph.initialize(model=net(), config={**CONFIG, "train_batch_size": 4}, training_data=data)[2]

    first = loader()
    whole = [rows for _ in range(2) for (rows,) in first]
    second = loader()
    batches = iter(second)
    for _ in range(4):
        next(batches)
    third = loader()
    third.load_state_dict(second.state_dict())
    rest = [rows for _ in range(2) for (rows,) in third]
    assert all(map(torch.equal, rest, whole[4:]))
    assert len(rest) == len(whole) - 4


def test_what_does_not_fit(data):
    class Endless(IterableDataset):
        def __iter__(self):
            return iter(())

    other = nn.Linear(2, 2)
    for keys, says in (
        ({"training_data": Endless()}, "must have a length"),
        ({"model_parameters": other.parameters()}, "is not the model's"),
        ({"optimizer": torch.optim.SGD(other.parameters(), 0.1)}, "is not the model's"),
    ):
        with pytest.raises(UsageError, match=says):
            zgraph.initialize(model=net(), config=CONFIG, **keys)
    with pytest.raises(UsageError, match="a scheduler needs an optimizer"):
        zgraph.initialize(model=net(), config={"train_batch_size": 1, "scheduler": {"type": "WarmupLR"}})


def test_a_joining_replica_takes_over_the_counts_of_an_engine(data):
    engine = zgraph.initialize_engine(model=net(), config=CONFIG, training_data=data)[0]
    other = zgraph.initialize_engine(model=net(), config=CONFIG, training_data=data)[0]
    engine.global_steps, engine.micro_steps, engine.skipped_steps = 7, 14, 1
    assert {*engine.elastic_state} == {"counts", "scale"}
    for name, one in engine.elastic_state.items():
        other.elastic_state[name].load_state_dict(one.state_dict())
    assert (other.global_steps, other.micro_steps, other.skipped_steps) == (7, 14, 1)
    with pytest.raises(ValueError, match="no counts"):
        other.elastic_state["counts"].load_state_dict({"global_steps": -1, "micro_steps": 0, "skipped_steps": 0})
