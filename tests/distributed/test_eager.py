"""`fullgraph="eager"`: a forward that is no one graph runs eagerly on gathered parameters, with the right gradients."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

import zgraph

from .lockstep import Lockstep, assert_same
from .nets import CLASSES, WIDTH, built, rows
from .pool import Pool

SHARDED = pytest.mark.parametrize("stage", [1, 2, 3])


class Branching(nn.Module):
    """Which layer runs depends on the data, and so on the rank; BatchNorm and a frozen parameter beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 13, bias=False)
        self.norm = nn.BatchNorm1d(13)
        self.left, self.right = nn.Linear(13, CLASSES), nn.Linear(13, CLASSES)
        self.frozen = nn.Parameter(torch.randn(CLASSES), requires_grad=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.norm(self.first(x)))
        last = self.left if hidden.sum().item() > 0 else self.right
        return F.cross_entropy(last(hidden) * self.frozen, y)


def train(mesh: DeviceMesh, stage: int, num_micro: int) -> tuple[tuple[float, float], list[str], list[list[float]]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options = {"find_unused_parameters": True}
        pair = Lockstep(mesh, built(Branching), ddp_options=options, stage=stage, fullgraph="eager")
    for step in range(8):
        pair.step(*(rows(100 * step + 10 * micro + pair.rank) for micro in range(num_micro)), no_sync=True)
    statistics = [m.norm.running_mean.tolist() for m in (pair.reference.model.module, pair.ours.model)]
    return (
        pair.errors,
        [str(w.message) for w in caught if "zgraph" in str(w.message) or "fullgraph" in str(w.message)],
        statistics,
    )


@SHARDED
@pytest.mark.parametrize("num_micro", [1, 3])
def test_gradients_are_those_of_ddp(pool: Pool, stage: int, num_micro: int) -> None:
    answers = pool.run(train, 2, stage, num_micro)
    assert_same([errors for errors, *_ in answers])
    theirs_on_the_first_rank, _ = answers[0][2]
    for _, warned, (_, ours) in answers:
        assert len(warned) == 1
        assert "all parameters are gathered" in warned[0]
        assert ours == pytest.approx(theirs_on_the_first_rank, rel=1e-6)


def forward_alone(mesh: DeviceMesh, stage: int) -> tuple[float, float]:
    """A forward whose backward never comes must not leave old weights behind for the next."""
    pair = Lockstep(
        mesh, built(Branching), ddp_options={"find_unused_parameters": True}, stage=stage, fullgraph="eager"
    )

    def look(side: object) -> None:
        side.model(*rows(99))  # type: ignore[attr-defined]

    for step in range(4):
        pair.step(rows(10 * step + pair.rank), before_update=look)
    return pair.errors


@SHARDED
def test_a_forward_without_a_backward(pool: Pool, stage: int) -> None:
    assert_same(pool.run(forward_alone, 2, stage))


def hold_memory(mesh: DeviceMesh, stage: int) -> list[int]:
    """Bytes of gathered parameters after a backward, and after a forward under no_grad."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = zgraph.compile(built(Branching)(), stage=stage, mesh=mesh, fullgraph="eager")
    gathered: list[torch.Tensor] = []
    model.first.register_forward_hook(lambda module, *_: gathered.append(module.weight))
    held = []
    model(*rows(0)).backward()
    held.append(gathered[-1].untyped_storage().nbytes())
    with torch.no_grad():
        model(*rows(0))
    held.append(gathered[-1].untyped_storage().nbytes())
    return held


@SHARDED
def test_what_was_gathered_is_freed(pool: Pool, stage: int) -> None:
    assert pool.run(hold_memory, 2, stage) == [[0, 0]] * 2
