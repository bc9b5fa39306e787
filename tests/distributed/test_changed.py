"""A model that is changed after it was compiled: taken as it is now, or refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

import zgraph
from zgraph.errors import UsageError, ZgraphError

from .nets import CLASSES, Mlp, built, rows
from .pool import Pool

Change = Callable[[nn.Module], object]
RANKS = pytest.mark.parametrize("num_ranks", [1, 2])
STAGES = pytest.mark.parametrize("stage", [0, 3])


def new_head(model: nn.Module) -> None:
    model.last = nn.Linear(24, CLASSES)


def new_layer(model: nn.Module) -> None:
    model.norm = nn.Sequential(model.norm, nn.Linear(24, 24))


def new_weight(model: nn.Module) -> None:
    model.first.weight = nn.Parameter(torch.ones_like(model.first.weight))


def no_bias(model: nn.Module) -> None:
    model.last.bias = None


def another_parameter(model: nn.Module) -> None:
    model.scale = nn.Parameter(torch.ones(()))


def weight_norm(model: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(model.last)


def tied(model: nn.Module) -> None:
    model.last.bias = model.first.bias


CHANGES = {
    new_head: r"last\.weight \(and 1 more\) was replaced",
    new_layer: r"norm\.0\.weight \(and 3 more\) was|norm\.1\.weight \(and 1 more\) was added",
    new_weight: r"first\.weight was replaced",
    no_bias: r"last\.bias was taken out",
    another_parameter: "scale was added",
    tied: r"last\.bias was taken out",
}


def message(mesh: DeviceMesh, stage: int, change: Change, called: bool) -> str:
    model = zgraph.compile(built(Mlp)(), stage=stage, mesh=mesh)
    if called:
        model(*rows(0)).backward()
    change(model)
    try:
        model(*rows(1)).backward()
    except UsageError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize("change", CHANGES, ids=[change.__name__ for change in CHANGES])
@pytest.mark.parametrize("called", [False, True])
@STAGES
@RANKS
def test_other_parameters_are_refused_by_name(
    pool: Pool, num_ranks: int, stage: int, called: bool, change: Change
) -> None:
    for text in pool.run(message, num_ranks, stage, change, called):
        assert re.search(CHANGES[change], text), text
        assert "then compile it" in text


def other_values(mesh: DeviceMesh, stage: int, as_dtensor: bool) -> str:
    model = zgraph.compile(built(Mlp)(), stage=stage, mesh=mesh)
    model(*rows(0))
    weight = model.last.weight
    weight.data = weight.detach() + 1 if as_dtensor else torch.ones(CLASSES, 24)
    try:
        model(*rows(1))
    except UsageError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize("as_dtensor", [True, False])
def test_assigning_data_is_refused_where_it_would_have_no_effect(pool: Pool, as_dtensor: bool) -> None:
    for text in pool.run(other_values, 2, 3, as_dtensor):
        assert "last.weight.data was assigned to" in text or "memory of last.weight was replaced" in text


def functional(mesh: DeviceMesh, stage: int) -> str:
    model = zgraph.compile(built(Mlp)(), stage=stage, mesh=mesh)
    model(*rows(0))

    def replaced(bias: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, {"last.bias": bias}, rows(1))

    said = []
    for call in (replaced, torch.func.grad(replaced)):  # of a model that was called, and of another
        try:
            call(torch.ones(CLASSES))
        except UsageError as error:
            said.append(str(error))
        model = zgraph.compile(built(Mlp)(), stage=stage, mesh=mesh)
    try:
        model.share_memory()
    except UsageError as error:
        said.append(str(error))
    return "; ".join(said)


@STAGES
@RANKS
def test_weights_of_functional_call_are_refused(pool: Pool, num_ranks: int, stage: int) -> None:
    for text in pool.run(functional, num_ranks, stage):
        assert text.count("last.bias was replaced") == 2
        assert "call model.share_memory() before zgraph.compile" in text


class WithActivation(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Identity()

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.act(self.norm(self.first(x))))


def changed_losses(mesh: DeviceMesh, stage: int) -> list[tuple[float, float]]:
    """Losses of zgraph's and of eager PyTorch's model: as built, with a module and with hooks that come and go."""
    sides = zgraph.compile(built(WithActivation)(), stage=stage, mesh=mesh), built(WithActivation)()
    found = []

    def losses() -> None:
        ours, theirs = (model(*rows(0)) for model in sides)
        found.append((ours.item(), theirs.item()))

    losses()
    for model in sides:
        model.act = nn.Sequential(nn.ReLU(), nn.Tanh())
    losses()
    handles = [model.norm.register_forward_hook(lambda *seen: 0.5 * seen[-1]) for model in sides]
    losses()
    handles += [model.act[1].register_forward_pre_hook(lambda _, given: (given[0] + 1,)) for model in sides]
    losses()
    for handle in handles[:2]:
        handle.remove()
    losses()
    handles = [nn.modules.module.register_module_forward_hook(lambda *seen: 2 * seen[-1])]
    losses()
    handles[0].remove()
    losses()
    return found


@STAGES
@RANKS
def test_modules_without_parameters_and_hooks_may_change(pool: Pool, num_ranks: int, stage: int) -> None:
    for found in pool.run(changed_losses, num_ranks, stage):
        assert len({round(theirs, 4) for _, theirs in found}) >= 5
        for ours, theirs in found:
            assert ours == pytest.approx(theirs, rel=1e-6)


def changed_on_one_rank(mesh: DeviceMesh, stage: int) -> str:
    model = zgraph.compile(built(Mlp)(), stage=stage, mesh=mesh)
    model(*rows(0)).backward()
    if mesh.get_rank() == 1:
        new_head(model)
    try:
        model(*rows(1)).backward()
    except ZgraphError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


@STAGES
def test_a_change_on_one_rank_is_told_to_the_other(pool: Pool, stage: int) -> None:
    first, second = pool.run(changed_on_one_rank, 2, stage)
    assert re.match(r"UsageError: the parameter last\.weight", second)
    assert re.match(r"PeerError: another rank failed: UsageError on rank 1: the parameter last\.weight", first)
