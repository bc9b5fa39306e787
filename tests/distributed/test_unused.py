"""Parameters behind outputs that nobody differentiates have no gradient, as in eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import zgraph

from .nets import CLASSES, WIDTH, built, rows
from .pool import Pool


@dataclass
class Outputs:
    """What a model may return that torch knows nothing of."""

    first: torch.Tensor
    second: torch.Tensor
    third: torch.Tensor


Loss = Callable[[Sequence[torch.Tensor]], torch.Tensor]
RANKS = pytest.mark.parametrize("num_ranks", [1, 2])
STAGES = pytest.mark.parametrize("stage", [0, 1, 3])


class Heads(nn.Module):
    """Three heads over one trunk, and a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(WIDTH, 16)
        self.heads = nn.ModuleList(nn.Linear(16, CLASSES) for _ in range(3))
        self.never = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden = self.trunk(x).tanh()
        first, second, third = (head(hidden) for head in self.heads)
        return F.cross_entropy(first, y), second, third.square().mean()


def first(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    return outputs[0]


def second(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    return outputs[1].square().mean()


def two(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    return outputs[0] + outputs[2]


def every(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    return outputs[0] + outputs[1].mean() + outputs[2]


LOSSES = {"first": [first], "second": [second], "two": [two], "every": [every], "in turn": [first, every, two, second]}


def differences(mesh: DeviceMesh, stage: int, losses: Sequence[Loss]) -> list[float]:
    """How far parameters are from eager PyTorch's after steps of AdamW with weight decay; infinite where only one side
    has a gradient.
    """
    model, reference = zgraph.compile(built(Heads)(), stage=stage, mesh=mesh), built(Heads)()
    sides = model, reference
    optimizers = [torch.optim.AdamW(side.parameters(), lr=0.01, weight_decay=0.5) for side in sides]
    found = []
    for number, loss in enumerate(losses):
        for side, optimizer in zip(sides, optimizers, strict=True):
            optimizer.zero_grad()
            loss(side(*rows(number))).backward()
        for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            found.append(0.0 if (ours.grad is None) == (theirs.grad is None) else torch.inf)
        for optimizer in optimizers:
            optimizer.step()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        whole = ours.full_tensor() if isinstance(ours, DTensor) else ours
        found.append(float((whole - theirs).abs().max()))
    return found


@pytest.mark.parametrize("losses", LOSSES)
@STAGES
@RANKS
def test_they_have_no_gradient_and_do_not_decay(pool: Pool, num_ranks: int, stage: int, losses: str) -> None:
    assert max(map(max, pool.run(differences, num_ranks, stage, LOSSES[losses]))) <= 1e-6


def go_apart(mesh: DeviceMesh, stage: int) -> list[bool]:
    """Which parameters have gradients where each rank differentiates another output."""
    model = zgraph.compile(built(Heads)(), stage=stage, mesh=mesh)
    outputs = model(*rows(0))
    (first if mesh.get_local_rank() else second)(outputs).backward()
    return [p.grad is not None for p in model.parameters()]


@STAGES
def test_what_one_rank_uses_has_a_gradient_on_all(pool: Pool, stage: int) -> None:
    for found in pool.run(go_apart, 2, stage):
        assert found == [True] * 6 + [False] * 4


def accumulate(mesh: DeviceMesh, stage: int) -> list[bool]:
    """The same after a micro-step under no_sync that used another head."""
    model = zgraph.compile(built(Heads)(), stage=stage, mesh=mesh)
    with zgraph.no_sync(model):
        second(model(*rows(0))).backward()
    first(model(*rows(1))).backward()
    return [p.grad is not None and bool((p.grad != 0).any()) for p in model.parameters()]


@STAGES
def test_what_a_micro_step_used_keeps_its_gradient(pool: Pool, stage: int) -> None:
    for found in pool.run(accumulate, 2, stage):
        assert found == [True] * 6 + [False] * 4


class InAnObject(Heads):
    def forward(self, x: torch.Tensor, y: torch.Tensor, as_object: bool = False) -> object:
        outputs = super().forward(x, y)
        return Outputs(*outputs) if as_object else outputs


def return_an_object(mesh: DeviceMesh, stage: int) -> list[bool]:
    """Which parameters have gradients after a loss of one output, and after one of two in an object."""
    model = zgraph.compile(built(InAnObject)(), stage=stage, mesh=mesh)
    model(*rows(0))[0].backward()
    found = [p.grad is not None for p in model.parameters()]
    model.zero_grad()
    outputs = model(*rows(1), as_object=True)
    (outputs.first + outputs.third).backward()
    return [*found, *(p.grad is not None for p in model.parameters())]


@RANKS
def test_outputs_in_an_object(pool: Pool, num_ranks: int) -> None:
    for found in pool.run(return_an_object, num_ranks, 3):
        assert found == [True] * 4 + [False] * 6 + [True] * 4 + [False] * 2 + [True] * 2 + [False] * 2
