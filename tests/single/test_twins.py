"""The state of a replica as its twin takes it over, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.single.elastic_parts import Held, net
from zgraph.errors import StateDictError
from zgraph.optim.twins import Twins
from zgraph.runtime.feedback import Feedback, forget_rests


class Pipe:
    """Messages of one twin to another, in order."""

    def __init__(self) -> None:
        self.held: list[torch.Tensor] = []

    def send(self, tensor: torch.Tensor, _: int) -> None:
        self.held.append(tensor.clone())

    def receive(self, tensor: torch.Tensor, _: int) -> None:
        tensor.copy_(self.held.pop(0))


def twin(lr: float, groups: int = 1, **state: Any) -> Twins:
    model = net()
    parameters = [*model.parameters()]
    split = [{"params": parameters[:groups]}, {"params": parameters[groups:]}] if groups > 1 else parameters
    optimizer = torch.optim.Adam(split, lr=lr)  # type: ignore[arg-type]
    model(torch.randn(6, 4)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(1 + lr)
    return Twins(model, optimizer, {name: Held(value) for name, value in state.items()}, rng=False)


def bits(twins: Twins) -> list[Any]:
    optimizer = [v.clone() for p in twins.model.parameters() for v in twins.optimizer.state[p].values()]
    return [*(t.clone() for t in twins.model.state_dict().values()), *optimizer]


def test_a_state_is_taken_over_to_the_last_bit() -> None:
    source, joiner, pipe = twin(0.5, a=1, b=[2.5]), twin(0.25, a=0, b=0), Pipe()
    source.send(pipe, [1], 12)  # type: ignore[arg-type]
    assert joiner.take(pipe, 0) == 12  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(bits(source), bits(joiner), strict=True))
    assert (joiner.state["a"].value, joiner.state["b"].value) == (1, [2.5])  # type: ignore[attr-defined]
    assert joiner.optimizer.param_groups[0]["lr"] == 0.5


class Settles:
    """Counts that take a step back when they are read, as those of an engine do whose device has left it out."""

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Held) -> None:
        self._optimizer, self._schedule, self.count = optimizer, schedule, 1

    def state_dict(self) -> Any:
        if self.count:
            self.count = self._schedule.value = 0
            self._optimizer.param_groups[0]["lr"] = 0.125
            for state in self._optimizer.state.values():
                state["step"] -= 1
        return {"count": self.count}

    def load_state_dict(self, state: Any) -> None:
        self.count = state["count"]


def test_a_step_that_is_undecided_is_settled_before_anything_is_sent() -> None:
    source, joiner, pipe = twin(0.5, schedule=1), twin(0.25, schedule=1), Pipe()
    for each in (source, joiner):
        each.state["counts"] = Settles(each.optimizer, each.state["schedule"])  # type: ignore[arg-type]
    source.send(pipe, [1], 12)  # type: ignore[arg-type]
    joiner.take(pipe, 0)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(bits(source), bits(joiner), strict=True))
    assert [each.optimizer.param_groups[0]["lr"] for each in (source, joiner)] == [0.125] * 2
    assert [each.state["schedule"].value for each in (source, joiner)] == [0] * 2  # type: ignore[attr-defined]
    assert all(int(state["step"]) == 0 for state in joiner.optimizer.state.values())


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (lambda: twin(0.5, a=1, b="bad"), r"state\['b'\] does not take"),
        (lambda: twin(0.5, a=1), "this rank .*'a', 'b'"),
        (lambda: twin(0.5, groups=2, a=1, b=2), "other groups"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(source: Callable[[], Twins], said: str) -> None:
    joiner, pipe = twin(0.25, a=0, b=0), Pipe()
    before = bits(joiner)
    source().send(pipe, [1], 12)  # type: ignore[arg-type]
    with pytest.raises(StateDictError, match=said):
        joiner.take(pipe, 0)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(before, bits(joiner), strict=True))
    assert (joiner.state["a"].value, joiner.state["b"].value) == (0, 0)  # type: ignore[attr-defined]
    assert joiner.optimizer.param_groups[0]["lr"] == 0.25


def test_codes_of_who_joins_begin_with_nothing_left_out() -> None:
    models = [net(), net()]
    all_of_them = [Feedback(SimpleNamespace(store=SimpleNamespace(model=model))) for model in models]  # type: ignore[arg-type]
    for feedback in all_of_them:
        feedback._flats["bucket"] = torch.ones(3)  # type: ignore[index]
    source, joiner, pipe = twin(0.5), twin(0.25), Pipe()
    joiner.model = models[0]
    joiner.optimizer = torch.optim.Adam(models[0].parameters())
    source.send(pipe, [1], 1)  # type: ignore[arg-type]
    joiner.take(pipe, 0)  # type: ignore[arg-type]
    assert [float(feedback._flats["bucket"].sum()) for feedback in all_of_them] == [0.0, 3.0]  # type: ignore[index]
    forget_rests(models[1])
    assert float(all_of_them[1]._flats["bucket"].sum()) == 0.0  # type: ignore[index]
