"""Gradients go where autograd was asked to bring them, and are where `zero_grad` finds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

import zgraph
from zgraph.errors import UsageError
from zgraph.options.validate import ATTRIBUTE

from .nets import Mlp, built, rows
from .pool import Pool

STAGES = pytest.mark.parametrize("stage", [0, 1, 3])
RANKS = pytest.mark.parametrize("num_ranks", [1, 2])

_NONE: Mapping[str, Any] = MappingProxyType({})
OFFLOADED = {"offload": "optimizer"}
EAGER = {"fullgraph": "eager"}

Act = Callable[[nn.Module, int], Any]
"""One rank's part of a step: of a model, and of the number that its batches are made of."""


def whole(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def error(mesh: DeviceMesh, stage: int, act: Act, options: Mapping[str, Any] = _NONE) -> float:
    """How far gradients are from the mean of what each rank's part of the step leaves in eager PyTorch.

    Infinite if a parameter has a gradient on one side only.
    """
    model = zgraph.compile(built(Mlp)(), stage=stage, mesh=mesh, **options)
    act(model, mesh.get_local_rank())
    sides = []
    for rank in range(mesh.size()):
        sides.append(built(Mlp)())
        act(sides[-1], rank)
    errors = [0.0]
    for ours, *theirs in zip(model.parameters(), *(side.parameters() for side in sides), strict=True):
        gradient = whole(ours.grad)
        made = [p.grad for p in theirs if p.grad is not None]
        if gradient is None or not made:
            errors.append(0.0 if gradient is None and not made else torch.inf)
        else:
            mean = torch.stack(made).mean(0)
            errors.append(float((gradient - mean).abs().max() / mean.abs().max()))
    return max(errors)


def adversarial(model: nn.Module, rank: int) -> None:
    """Inputs are moved along their gradient, and trained on."""
    x, y = rows(rank)
    x.requires_grad_()
    (along,) = torch.autograd.grad(model(x, y), x)
    model((x + 0.1 * along.sign()).detach(), y).backward()


def of_some(model: nn.Module, rank: int) -> None:
    model(*rows(rank)).backward(inputs=[model.last.weight, model.norm.bias])


def of_some_then_all(model: nn.Module, rank: int) -> None:
    of_some(model, rank)
    model(*rows(rank + 10)).backward()


def asked_for(model: nn.Module, rank: int) -> None:
    """Gradients that `autograd.grad` gives."""
    parameters = [*model.parameters()]
    for parameter, gradient in zip(parameters, torch.autograd.grad(model(*rows(rank)), parameters), strict=True):
        assert parameter.grad is None
        parameter.grad = gradient


def doubled(model: nn.Module, rank: int) -> None:
    """A hook that changes a gradient, on one parameter."""
    model.first.weight.register_hook(lambda gradient: 2 * gradient)
    for number in range(2):
        model(*rows(rank + 10 * number)).backward()


def two_backwards(model: nn.Module, rank: int) -> None:
    loss = model(*rows(rank))
    loss.backward(retain_graph=True)
    loss.backward()


ACTS = [adversarial, of_some, of_some_then_all, asked_for, doubled, two_backwards]


@pytest.mark.parametrize("act", ACTS, ids=[act.__name__ for act in ACTS])
@STAGES
@RANKS
def test_gradients_are_where_autograd_was_asked_to_bring_them(pool: Pool, num_ranks: int, stage: int, act: Act) -> None:
    assert max(pool.run(error, num_ranks, stage, act)) <= 1e-6


@pytest.mark.parametrize("act", [adversarial, of_some_then_all, asked_for], ids=lambda act: act.__name__)
def test_where_parameters_are_cast_or_offloaded(pool: Pool, act: Act) -> None:
    assert max(pool.run(error, 2, 2, act, OFFLOADED)) <= 1e-6


@pytest.mark.parametrize("act", [adversarial, of_some], ids=lambda act: act.__name__)
def test_where_the_model_runs_eagerly(pool: Pool, act: Act) -> None:
    assert max(pool.run(error, 2, 3, act, EAGER)) <= 1e-6


def unsynced(model: nn.Module, rank: int, number: int = 0, scale: float = 1.0) -> None:
    """A micro-step without a reduction."""
    local = zgraph.no_sync(model) if ATTRIBUTE in model.__dict__ else torch.enable_grad()
    with local:
        (scale * model(*rows(rank + 10 * number))).backward()


def discarded_by_model(model: nn.Module, rank: int) -> None:
    unsynced(model, rank, scale=1000.0)
    model.zero_grad()
    model(*rows(rank + 10)).backward()


def discarded_by_optimizer(model: nn.Module, rank: int) -> None:
    optimizer = torch.optim.SGD(model.parameters())
    unsynced(model, rank, scale=torch.nan)
    optimizer.zero_grad()
    unsynced(model, rank, 1)
    model(*rows(rank + 20)).backward()


def set_to_zero(model: nn.Module, rank: int) -> None:
    unsynced(model, rank, scale=1000.0)
    model.zero_grad(set_to_none=False)
    model(*rows(rank + 10)).backward()


def scaled_between(model: nn.Module, rank: int) -> None:
    """What is there already is halved, in place and by assignment."""
    unsynced(model, rank)
    for at, parameter in enumerate(model.parameters()):
        parameter.grad = parameter.grad.mul_(0.5) if at % 2 else parameter.grad * 0.5
    model(*rows(rank + 10)).backward()


def synced_before(model: nn.Module, rank: int) -> None:
    model(*rows(rank)).backward()
    unsynced(model, rank, 1)
    unsynced(model, rank, 2)
    model(*rows(rank + 30)).backward()


def gradient_of_an_input_between(model: nn.Module, rank: int) -> None:
    """A backward that syncs, but not for the parameters."""
    unsynced(model, rank)
    x, y = rows(rank)
    torch.autograd.grad(model(x.requires_grad_(), y), x)
    model(*rows(rank + 10)).backward()


def hooked(model: nn.Module, rank: int) -> None:
    """Hooks that look at gradients, on some parameters."""
    for parameter in [model.first.weight, model.last.bias]:
        parameter.register_hook(lambda gradient: gradient)
    model(*rows(rank)).backward()
    unsynced(model, rank, 1)
    unsynced(model, rank, 2)
    model(*rows(rank + 30)).backward()


ACCUMULATING = [
    hooked,
    discarded_by_model,
    discarded_by_optimizer,
    set_to_zero,
    scaled_between,
    synced_before,
    gradient_of_an_input_between,
]


@pytest.mark.parametrize("act", ACCUMULATING, ids=[act.__name__ for act in ACCUMULATING])
@STAGES
def test_what_no_sync_leaves_is_in_grad(pool: Pool, stage: int, act: Act) -> None:
    assert max(pool.run(error, 2, stage, act)) <= 1e-6


@pytest.mark.parametrize("act", ACCUMULATING, ids=[act.__name__ for act in ACCUMULATING])
def test_what_no_sync_leaves_where_the_model_runs_eagerly(pool: Pool, act: Act) -> None:
    assert max(pool.run(error, 2, 3, act, EAGER)) <= 1e-6


def ends_within_an_accumulation(mesh: DeviceMesh, stage: int, fullgraph: Any) -> tuple[float, float]:
    """How far parameters are from eager PyTorch's, and the norms of gradients, after a step with nothing reduced."""
    model = zgraph.compile(built(Mlp)(), stage=stage, mesh=mesh, fullgraph=fullgraph)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rank = mesh.get_local_rank()
    unsynced(model, rank)
    unsynced(model, rank, 1)
    optimizer.step()
    reference = built(Mlp)()
    step = torch.optim.SGD(reference.parameters(), lr=0.1)
    for other in range(mesh.size()):
        for number in range(2):
            reference(*rows(other + 10 * number)).div(mesh.size()).backward()
    step.step()
    pairs = [*zip(model.parameters(), reference.parameters(), strict=True)]
    gradients = [(whole(a.grad), b.grad) for a, b in pairs]
    return (
        max(float((whole(a.detach()) - b).abs().max()) for a, b in pairs),
        max(float((a - b).abs().max()) for a, b in gradients),
    )


@pytest.mark.parametrize("fullgraph", [True, False, "eager"])
@STAGES
def test_a_loader_that_ends_within_an_accumulation(pool: Pool, stage: int, fullgraph: Any) -> None:
    for parameters, gradients in pool.run(ends_within_an_accumulation, 2, stage, fullgraph):
        assert parameters <= 1e-6
        assert gradients <= 1e-6


def count_hooks(mesh: DeviceMesh, stage: int) -> list[int]:
    """How often a post-accumulate hook has run: after a micro-step under no_sync, and one outside."""
    model = zgraph.compile(built(Mlp)(), stage=stage, mesh=mesh)
    ran = []
    model.last.weight.register_post_accumulate_grad_hook(lambda p: ran.append(whole(p.grad)))
    unsynced(model, mesh.get_local_rank())
    counts = [len(ran)]
    model(*rows(mesh.get_local_rank() + 10)).backward()
    assert torch.equal(ran[-1], whole(model.last.weight.grad))
    return [*counts, len(ran)]


@RANKS
@STAGES
def test_a_post_accumulate_hook_sees_what_is_reduced(pool: Pool, stage: int, num_ranks: int) -> None:
    assert pool.run(count_hooks, num_ranks, stage) == [[0, 1]] * num_ranks


def penalise(mesh: DeviceMesh, stage: int, fullgraph: Any) -> float | str:
    """How far gradients of a loss with a gradient penalty are from eager PyTorch's, or what is said of it."""

    def act(model: nn.Module, rank: int) -> None:
        x, y = rows(rank)
        loss = model(x.requires_grad_(), y)
        (along,) = torch.autograd.grad(loss, x, create_graph=True)
        (model(*rows(rank + 5)) + along.square().sum()).backward()

    try:
        return error(mesh, stage, act, {"fullgraph": fullgraph})
    except UsageError as raised:
        return str(raised)


@STAGES
@RANKS
def test_second_derivatives_run_eagerly_or_say_so(pool: Pool, num_ranks: int, stage: int) -> None:
    for text in pool.run(penalise, num_ranks, stage, True):
        assert 'pass fullgraph="eager"' in text
    assert max(pool.run(penalise, num_ranks, stage, "eager")) <= 1e-5


def differentiate_twice(mesh: DeviceMesh, fullgraph: Any) -> str:
    """What is said of second derivatives by parameters."""
    model = zgraph.compile(built(Mlp)(), stage=3, mesh=mesh, fullgraph=fullgraph)
    weight = model.last.weight
    try:
        (gradient,) = torch.autograd.grad(model(*rows(0)), weight, create_graph=True)
        gradient.square().sum().backward()
    except (UsageError, RuntimeError) as raised:
        return str(raised)
    return "nothing was raised"


@pytest.mark.parametrize("fullgraph", [True, False, "eager"])
def test_second_derivatives_by_shards_are_never_silently_left_out(pool: Pool, fullgraph: Any) -> None:
    for text in pool.run(differentiate_twice, 2, fullgraph):
        assert "create_graph" in text or "once_differentiable" in text or "does not require grad" in text


def remove_within(mesh: DeviceMesh) -> int:
    """How often a hook runs that is removed under no_sync."""
    model = zgraph.compile(built(Mlp)(), stage=3, mesh=mesh)
    ran: list[int] = []
    handle = model.last.weight.register_post_accumulate_grad_hook(lambda _: ran.append(1))
    with zgraph.no_sync(model):
        model(*rows(0)).backward()
        handle.remove()
    model(*rows(1)).backward()
    return len(ran)


@RANKS
def test_a_hook_that_is_removed_under_no_sync_stays_away(pool: Pool, num_ranks: int) -> None:
    assert pool.run(remove_within, num_ranks) == [0] * num_ranks
