"""State dicts and compiled models are saved and copied by torch's and Python's own functions."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import zgraph
from zgraph.errors import StateDictError, UsageError

from .nets import Mlp, Odd, Tied, built, rows, words
from .pool import Pool

RANKS = pytest.mark.parametrize("num_ranks", [1, 2, 3])
STAGES = pytest.mark.parametrize("stage", [0, 1, 3])


def whole(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in state.items()}


def same(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(t, right[name]) for name, t in left.items())


def by_torch(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def by_pickle(state: Any) -> Any:
    return pickle.loads(pickle.dumps(state))


def on_the_host(state: Any) -> Any:
    return by_torch({name: tensor.cpu() for name, tensor in state.items()})


WAYS = [by_torch, copy.deepcopy, by_pickle, on_the_host]


def comes_back(mesh: DeviceMesh, stage: int) -> list[bool]:
    """Whether a model's state dict does, each way, and is loaded."""
    model = zgraph.compile(built(Odd)(), stage=stage, mesh=mesh)
    values = whole(model.state_dict())
    found = []
    for way in WAYS:
        state = way(model.state_dict())
        found.append(same(values, whole(state)))
        other = zgraph.compile(Odd(), stage=stage, mesh=mesh)
        other.load_state_dict(state)
        found.append(same(values, whole(other.state_dict())))
    first = way(model.first.state_dict())
    return [*found, same(whole(model.first.state_dict()), whole(first))]


@RANKS
@STAGES
def test_a_state_dict_comes_back(pool: Pool, num_ranks: int, stage: int) -> None:
    assert all(map(all, pool.run(comes_back, num_ranks, stage)))


Make = Callable[[Any], torch.optim.Optimizer]


def resumes(mesh: DeviceMesh, stage: int, make: Make) -> bool:
    """Whether a training that is saved after a step goes on as the one that was not."""
    model = zgraph.compile(built(Mlp)(), stage=stage, mesh=mesh)
    optimizer = make(model.parameters())

    def step(number: int) -> None:
        model(*rows(number)).backward()
        optimizer.step()
        optimizer.zero_grad()

    step(0)
    saved = by_torch({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    step(1)
    expected = whole(model.state_dict())
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    step(1)
    return same(expected, whole(model.state_dict()))


@pytest.mark.parametrize("make", [torch.optim.AdamW, zgraph.optim.AdamW], ids=["torch", "zgraph"])
@STAGES
def test_training_goes_on_from_what_was_saved(pool: Pool, stage: int, make: Make) -> None:
    assert all(pool.run(resumes, 2, stage, make))


def copied(mesh: DeviceMesh, stage: int, options: Mapping[str, Any]) -> list[float]:
    """How far a copy's loss and gradients are from eager PyTorch's after both sides were changed apart."""
    model = zgraph.compile(built(Tied)(), stage=stage, mesh=mesh, **options)
    model(*words(0)).backward()
    twin, reference = copy.deepcopy(model), built(Tied)()
    with torch.no_grad():
        for parameter in [*twin.parameters(), *reference.parameters()]:
            parameter.mul_(0.5)
        for parameter in model.parameters():
            parameter.zero_()
    loss, expected = twin(*words(1)), reference(*words(1))
    loss.backward()
    expected.backward()
    gradients = whole({n: p.grad for n, p in twin.named_parameters()})
    theirs = {n: p.grad for n, p in reference.named_parameters()}
    assert gradients.keys() == theirs.keys()
    errors = [float((gradients[n] - g).abs().max() / g.abs().max()) for n, g in theirs.items()]
    return [abs(loss.item() - expected.item()), *errors]


@RANKS
@STAGES
def test_a_copy_computes_with_values_of_its_own(pool: Pool, num_ranks: int, stage: int) -> None:
    assert max(map(max, pool.run(copied, num_ranks, stage, {}))) <= 1e-5


@pytest.mark.parametrize("options", [{"offload": "optimizer"}, {"fullgraph": "eager"}, {"fullgraph": False}], ids=str)
def test_a_copy_of_what_is_offloaded_or_eager(pool: Pool, options: Mapping[str, Any]) -> None:
    assert max(map(max, pool.run(copied, 2, 2, options))) <= 1e-5


def averaged(mesh: DeviceMesh, stage: int) -> tuple[bool, float]:
    """Whether an exponential moving average is eager PyTorch's, and how far its loss is."""
    sides: list[tuple[nn.Module, AveragedModel]] = []
    for model in (zgraph.compile(built(Mlp)(), stage=stage, mesh=mesh), built(Mlp)()):
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for number in range(3):
            optimizer.zero_grad()
            model(*rows(number)).backward()
            optimizer.step()
            average.update_parameters(model)
        sides.append((model, average))
    (_, ours), (_, theirs) = sides
    pairs = zip(whole(ours.state_dict()).values(), theirs.state_dict().values(), strict=True)
    close = all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)
    return close, abs(ours(*rows(9)).item() - theirs(*rows(9)).item())


@STAGES
def test_a_moving_average(pool: Pool, stage: int) -> None:
    for close, error in pool.run(averaged, 2, stage):
        assert close
        assert error <= 1e-6


class Kept(Mlp):
    """A model that saves itself as those of transformers do."""

    def save_pretrained(self, path: str, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
        torch.save(state_dict, path)


def of_another_rank(mesh: DeviceMesh, folder: str) -> list[str]:
    """Words to the first rank's model and optimizer on each rank, and to its numbers."""
    model = zgraph.compile(built(Mlp)(), stage=3, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    model(*rows(mesh.get_local_rank())).backward()
    optimizer.step()
    for name, thing in (("model", model), ("optimizer", optimizer)):
        if mesh.get_local_rank() == 0:
            torch.save(thing.state_dict(), f"{folder}/{name}")
    dist.barrier(mesh.get_group())
    said = []
    for name, thing in (("model", model), ("optimizer", optimizer)):
        try:
            thing.load_state_dict(torch.load(f"{folder}/{name}", weights_only=True))
            optimizer.step()
        except StateDictError as error:
            said.append(str(error))
    return said


def test_shards_that_another_rank_saved_are_refused(pool: Pool, tmp_path: Path) -> None:
    first, second = pool.run(of_another_rank, 2, str(tmp_path), spoils=True)
    assert first == []
    assert "first.weight is the shard of rank 0, not of rank 1" in second[0]
    assert "of the optimizer's state is the shard of rank 0, not of rank 1" in second[1]
    assert all(".full_tensor() on every rank" in text for text in second)


def kept_whole(mesh: DeviceMesh, folder: str, stage: int) -> tuple[bool, float]:
    """Whether save_pretrained wrote whole weights, and how far numbers of shards are from the whole's."""
    model = zgraph.compile(built(Kept)(), stage=stage, mesh=mesh)
    model.save_pretrained(f"{folder}/{stage}")
    dist.barrier(mesh.get_group())
    saved = torch.load(f"{folder}/{stage}", weights_only=True)
    bias = whole({"": model.norm.bias.detach()})[""].clone()
    bias[0] = 0.5
    model.norm.bias.detach().copy_(bias)
    gaps = [0.0]
    for name, parameter in model.named_parameters():
        full = whole({name: parameter.detach()})[name]
        for number in (torch.Tensor.norm, torch.sum, torch.max, lambda t: (t == 0).sum()):
            gaps.append(abs(float(number(parameter.detach())) - float(number(full))))
    return same(saved, built(Kept)().state_dict()), max(gaps)


@pytest.mark.parametrize("stage", [0, 3])
def test_whole_weights_are_saved_and_numbers_are_of_all_ranks(pool: Pool, tmp_path: Path, stage: int) -> None:
    for is_whole, gap in pool.run(kept_whole, 2, str(tmp_path), stage):
        assert is_whole
        assert gap <= 1e-5


def test_pickle_names_what_to_save_instead() -> None:
    model = zgraph.compile(Mlp())
    for save in (pickle.dumps, copy.copy, lambda m: torch.save(m, io.BytesIO())):
        with pytest.raises(UsageError, match=r"Save model.state_dict\(\) instead"):
            save(model)


def test_a_copy_leaves_the_model_as_it_is() -> None:
    model = zgraph.compile(built(Mlp)())
    own = model.forward
    model.forward = lambda *inputs: 2 * own(*inputs)
    before = dict(model.__dict__)
    twin = copy.deepcopy(model)
    assert model.__dict__ == before
    assert model(*rows(0)).item() == pytest.approx(2 * twin(*rows(0)).item())
