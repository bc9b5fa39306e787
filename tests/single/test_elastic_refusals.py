"""Steps of an elastic job that would use gradients of one replica alone are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import torch
from torch import nn

import zgraph
from zgraph.bridge.private_runtime import tcp_store
from zgraph.errors import UsageError


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """A job of one replica, and its store."""
    store, port = tcp_store("localhost", 0, timedelta(seconds=30), serves=True)
    monkeypatch.setenv("ZGRAPH_ELASTIC_STORE", f"localhost:{port}")
    monkeypatch.setenv("ZGRAPH_ELASTIC", "1:1")
    monkeypatch.setenv("ZGRAPH_ELASTIC_REPLICA", "0")
    yield store
    del store


def trained(body: Callable[[nn.Module, torch.optim.Optimizer], None]) -> int:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = zgraph.elastic(model, optimizer)
    for _ in run.steps(2):
        model(torch.ones(2, 4)).sum().backward()
        body(model, optimizer)
        optimizer.zero_grad()
    return run.step


def twice(_: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.step()


def unfrozen(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.requires_grad_(True)(torch.ones(2, 4)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (twice, "again in one step"),
        (unfrozen, "was frozen"),
        (lambda _, optimizer: optimizer.step(lambda: 0.0), "without a closure"),
        (lambda _, optimizer: optimizer.step(closure=lambda: 0.0), "without a closure"),
        (lambda *_: None, "has not called optimizer.step"),
    ],
)
def test_steps_that_would_be_of_one_replica_are_refused(
    alone: object, body: Callable[[nn.Module, torch.optim.Optimizer], None], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        trained(body)


def test_one_step_in_each_body_is_taken(alone: object) -> None:
    assert trained(lambda _, optimizer: optimizer.step()) == 2


def test_a_step_before_the_first_is_refused(alone: object) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(UsageError, match="step is the number of steps that were taken, and not -1"):
        zgraph.elastic(model, torch.optim.SGD(model.parameters(), lr=0.1), step=-1)


def test_parameters_that_are_not_the_models_are_refused(alone: object) -> None:
    model, head = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(UsageError, match="not the model's"):
        zgraph.elastic(model, torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.1))
