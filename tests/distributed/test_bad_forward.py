"""Forwards that zgraph cannot run, and calls that come too often: an error on every rank, and the model is usable."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

import zgraph
from zgraph.errors import (
    BackwardTwiceError,
    CaptureError,
    EscapedParameterError,
    GraphBreakError,
    StaleParametersError,
    UsageError,
    ZgraphError,
)

from .lockstep import local
from .mistakes import Caught, assert_caught, make, train_once
from .nets import Mlp, built, rows
from .pool import Pool


class Wrong(Mlp):
    """Makes the mistake that its attribute names."""

    mistake = ""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> object:
        loss = F.cross_entropy(self.logits(x), y)
        if self.mistake == "branch" and loss > 0:  # the line that breaks the graph
            return loss * 2
        if self.mistake == "parameter":
            return loss, self.first.weight
        if self.mistake == "raise":
            raise KeyError("the user's own error")
        if self.mistake == "view":
            return loss, self.first.weight[1:].t()
        if self.mistake == "in place":
            with torch.no_grad():
                self.first.weight.mul_(0.5)
        return loss


CASES: dict[str, tuple[type[Exception], tuple[str, ...]]] = {
    "branch": (GraphBreakError, ("fullgraph=False",)),
    "parameter": (EscapedParameterError, ("first.weight", "clone")),
    "view": (EscapedParameterError, ("first.weight", "clone")),
    "raise": (KeyError, ("the user's own error", f"{__file__}:", "the forward of Wrong")),
    "in place": (CaptureError, ("first.weight", "in place")),
}


def call_wrongly(mesh: DeviceMesh, stage: int, mistake: str) -> Caught:
    model = zgraph.compile(built(Wrong)(), stage=stage, mesh=mesh)
    inputs = rows(mesh.get_local_rank())
    model.mistake = mistake

    def call_rightly() -> None:
        model.mistake = ""
        train_once(model, inputs)

    return make(model, lambda: model(*inputs), call_rightly, kind=(ZgraphError, KeyError))


@pytest.mark.parametrize("mistake", CASES)
@pytest.mark.parametrize("stage", [1, 3])
def test_forwards_that_cannot_be(pool: Pool, stage: int, mistake: str) -> None:
    error, words = CASES[mistake]
    assert_caught(pool.run(call_wrongly, 2, stage, mistake), error, *words)


def test_a_graph_break_is_shown_with_its_file_and_line(pool: Pool) -> None:
    lines = Path(__file__).read_text().splitlines()
    number = next(i for i, line in enumerate(lines, 1) if "the line that breaks" in line)
    assert_caught(pool.run(call_wrongly, 2, 3, "branch"), GraphBreakError, f"{__file__}:{number}", "loss > 0")


def go_back_twice(mesh: DeviceMesh, stage: int) -> Caught:
    model = zgraph.compile(built(Mlp)(), stage=stage, mesh=mesh)
    loss = model(*rows(mesh.get_local_rank()))
    loss.backward()
    return make(model, loss.backward, lambda: train_once(model, rows(0)))


@pytest.mark.parametrize("stage", range(4))
def test_a_second_backward(pool: Pool, stage: int) -> None:
    assert_caught(pool.run(go_back_twice, 2, stage), BackwardTwiceError, "retain_graph=True")


def go_back_twice_rightly(mesh: DeviceMesh, stage: int) -> float:
    """The largest difference between the gradients of two backwards and twice those of one."""
    once, twice = (zgraph.compile(built(Mlp)(), stage=stage, mesh=mesh) for _ in range(2))
    once(*rows(mesh.get_local_rank())).backward()
    loss = twice(*rows(mesh.get_local_rank()))
    loss.backward(retain_graph=True)
    loss.backward()
    pairs = zip(once.parameters(), twice.parameters(), strict=True)
    return max((2 * local(a.grad) - local(b.grad)).abs().max().item() for a, b in pairs if local(a.grad).numel())


@pytest.mark.parametrize("stage", range(4))
def test_a_second_backward_with_retain_graph(pool: Pool, stage: int) -> None:
    assert pool.run(go_back_twice_rightly, 2, stage) == [0.0, 0.0]


def step_in_between(mesh: DeviceMesh) -> Caught:
    model = zgraph.compile(built(Mlp)(), mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_once(model, rows(mesh.get_local_rank()))
    loss = model(*rows(mesh.get_local_rank()))
    optimizer.step()
    return make(model, loss.backward, lambda: train_once(model, rows(0)))


def test_a_step_between_forward_and_backward(pool: Pool) -> None:
    assert_caught(pool.run(step_in_between, 2), StaleParametersError, "forward again")


def convert(mesh: DeviceMesh, stage: int, dtype: torch.dtype) -> Caught:
    model = zgraph.compile(built(Mlp)(), stage=stage, mesh=mesh)
    train_once(model, rows(mesh.get_local_rank()))
    model.to(dtype)
    return make(model, lambda: model(*rows(mesh.get_local_rank())))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("stage", range(4))
def test_a_model_converted_after_compile(pool: Pool, stage: int, dtype: torch.dtype) -> None:
    assert_caught(pool.run(convert, 2, stage, dtype), UsageError, "model.to()", "before it is compiled")


def move_nowhere(mesh: DeviceMesh, stage: int) -> None:
    model = zgraph.compile(built(Mlp)(), stage=stage, mesh=mesh)
    for model in (model.to("cpu"), model.float(), model.train(), model.requires_grad_()):  # noqa: B020
        train_once(model, rows(mesh.get_local_rank()))


@pytest.mark.parametrize("stage", [0, 3])
def test_a_model_moved_to_where_it_is(pool: Pool, stage: int) -> None:
    pool.run(move_nowhere, 2, stage)
