"""Ops of the user's own, recurrent layers, and ops that hold functions: captured as eager computes, or named."""

from __future__ import annotations

import copy
import logging
import warnings

import pytest
import torch
from torch import nn

import zgraph
from zgraph.errors import CaptureError


@torch.library.custom_op("user::scale_", mutates_args={"x"})
def scale_(x: torch.Tensor, by: float) -> None:
    x.mul_(by)


@torch.library.custom_op("user::swap_", mutates_args={"x", "y"})
def swap_(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    kept = x.clone()
    x.copy_(y)
    y.copy_(kept)
    return kept.sum()


swap_.register_fake(lambda x, y: x.new_empty(()))


class Whole(nn.Module):
    """Writes to all of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def written(self, x: torch.Tensor) -> torch.Tensor:
        made = self.first(x).detach().clone()
        torch.ops.user.scale_(made, 2.0)
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.second(x) * self.written(x)).mean() + self.first(x).square().mean()


class View(Whole):
    """Writes to a part, which is a view, and reads the rest."""

    def written(self, x: torch.Tensor) -> torch.Tensor:
        made = self.first(x).detach().clone()
        torch.ops.user.scale_(made[:, 2:5], 3.0)
        return made


class Two(Whole):
    """Writes to two tensors, and returns a third."""

    def written(self, x: torch.Tensor) -> torch.Tensor:
        one, two = self.first(x).detach().clone(), x.clone()
        total = torch.ops.user.swap_(one, two)
        return one - 2 * two + total


class Input(Whole):
    """Writes to what it is given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.ops.user.scale_(x, 0.5)
        return super().forward(x)


class Recurrent(nn.Module):
    """Two layers of an LSTM, to both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made, (hidden, cell) = self.layers(x[None])
        return made.square().mean() + hidden.mean() * cell.mean()


@pytest.mark.parametrize("build", [Whole, View, Two, Input, Recurrent])
def test_it_trains_as_eagerly(build: type[nn.Module]) -> None:
    torch.manual_seed(0)
    plain = build()
    model = zgraph.compile(copy.deepcopy(plain), stage=3)
    for step in range(3):
        losses = []
        for trained in (plain, model):
            x = torch.linspace(-1, 1, 32).view(4, 8) + 0.1 * step
            loss = trained(x)
            loss.backward()
            with torch.no_grad():
                for parameter in trained.parameters():
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None
            losses.append((loss.detach(), x))
        for theirs, ours in zip(*losses, strict=True):
            torch.testing.assert_close(ours, theirs)
        with torch.no_grad():
            torch.testing.assert_close(model(x.clone()), plain(x.clone()))


class Strict(Whole):
    """Calls a higher-order op that the IR does not have."""

    def written(self, x: torch.Tensor) -> torch.Tensor:
        return torch._higher_order_ops.strict_mode(lambda x: (x.sin(),), (x,))[0]


class Holding(Whole):
    """Makes a tensor of data in a branch."""

    def written(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: x + torch.tensor([1.0] * 8), lambda x: x.sin(), (x,))


@pytest.mark.parametrize(
    ("build", "words"),
    [(Strict, "calls strict_mode.*fullgraph=False"), (Holding, r"as an operand \(in a function of torch\.cond\)")],
)
def test_functions_that_have_no_form_in_the_ir_are_named_with_their_line(build: type[nn.Module], words: str) -> None:
    with pytest.raises(CaptureError, match=rf"{words}(.|\n)*test_custom_ops\.py:\d+"):
        zgraph.compile(build(), stage=3)(torch.ones(4, 8))


LOGGER = logging.getLogger("mine")


def test_what_a_forward_tells_is_told_when_the_graph_has_run(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    class Inner(Whole):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            print("sum", x.sum().detach(), "of", tuple(x.shape), sep=" | ", flush=True)
            warnings.warn("this is old", DeprecationWarning, stacklevel=2)
            LOGGER.warning("rows: %d", 4)
            return super().forward(x)

    class Telling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    model = zgraph.compile(Telling(), stage=3)
    for rows in (1.0, 2.0):
        with pytest.warns(DeprecationWarning, match="this is old") as told:
            model(torch.full((4, 8), rows)).backward()
        assert told[0].filename == __file__
        assert capsys.readouterr().out == f"sum | tensor({32 * rows:.0f}.) | of | (4, 8)\n"
    assert [r.getMessage() for r in caplog.records if r.name == "mine"] == ["rows: 4"] * 2


def test_a_piece_that_stays_eager_is_told_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZGRAPH_LOGS", "capture")
    model = zgraph.compile(Strict(), stage=3, fullgraph=False)
    with caplog.at_level(logging.INFO, logger="zgraph"):
        for _ in range(2):
            model(torch.ones(4, 8)).backward()
    (said,) = [r.getMessage() for r in caplog.records if "runs eagerly" in r.getMessage()]
    assert "strict_mode" in said
    assert "test_custom_ops.py:" in said
