"""Copies of masters on the host as a GPU has them: cast there, brought on a lane, awaited where they are read.

The processor stands for the device: its copies lie apart from what is cast.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import zgraph
from zgraph.compiler.compiled_model import compiled_model
from zgraph.optim import AdamW
from zgraph.runtime import host, shards, working_copies

BF16 = torch.bfloat16
INPUTS = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 1))


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (shards, working_copies):
        monkeypatch.setattr(module, "are_brought", lambda device: True)


def made(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return zgraph.compile(Net(), offload="optimizer", **options)


def losses(model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int = 3) -> list[float]:
    found = []
    for _ in range(num_steps):
        loss = model(INPUTS).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("kind", [AdamW, torch.optim.AdamW])
@pytest.mark.parametrize("param_dtype", [BF16, None])
def test_the_losses_are_the_same(kind: Any, param_dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = made(param_dtype=param_dtype)
    expected = losses(plain, kind(plain.parameters(), lr=1e-2))
    for module in (shards, working_copies):
        monkeypatch.setattr(module, "are_brought", lambda device: True)
    model = made(param_dtype=param_dtype)
    assert losses(model, kind(model.parameters(), lr=1e-2)) == expected
    store = compiled_model(model).session.store
    for slot in store.slots.values():
        assert store.copies.is_brought(slot.working)
        assert slot.beside is not slot.working
        assert (slot.beside is None) == (param_dtype is None), "what has one dtype is brought from the master"


def test_the_update_writes_what_is_brought(apart: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the bytes cross, and nothing is cast a second time."""
    model = made(param_dtype=BF16)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    losses(model, optimizer)
    started: list[torch.Tensor] = []
    start = host.CopyLane.start
    monkeypatch.setattr(host.CopyLane, "start", lambda self, t, s: started.append(s) or start(self, t, s))
    copies = compiled_model(model).session.store.copies
    cast: list[torch.Tensor] = []
    copy_ = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda t, s, *a, **k: cast.append(t) or copy_(t, s, *a, **k))
    copies.refresh()
    for slot in compiled_model(model).session.store.slots.values():
        assert slot.beside is not None
        assert torch.equal(slot.beside, slot.rest.bfloat16())
    copies.settle()
    assert {t.dtype for t in started} == {BF16}
    assert len(started) == len(list(model.parameters()))
    assert len([t for t in cast if t.dtype == BF16]) == len(started), "the lane's own"
    copies.refresh()
    assert len(started) == len(list(model.parameters())), "nothing has changed"


def test_a_program_waits_where_it_first_reads(apart: None) -> None:
    model = made(param_dtype=BF16)
    arrived: list[str] = []
    store = compiled_model(model).session.store
    names = {slot.working.data_ptr(): name for name, slot in store.slots.items()}
    arrive = store.copies.arrive
    store.copies.arrive = lambda *ts: arrived.extend(names[t.data_ptr()] for t in ts) or arrive(*ts)  # type: ignore
    model(INPUTS).sum().backward()
    forward = arrived[: len(names)]
    assert sorted(forward) == sorted(names.values()), "each once in the forward"
    assert [n.partition(".")[0] for n in forward] == ["0", "0", "2", "2", "4", "4"]


class SlowLane:
    """A lane that copies when somebody waits."""

    def __init__(self) -> None:
        self.num_waits = 0

    def start(self, target: torch.Tensor, source: torch.Tensor) -> SlowLane:
        self.target, self.source = target, source
        return self

    def wait(self) -> None:
        self.target.copy_(self.source)

    def synchronize(self) -> None:
        self.num_waits += 1

    settle = synchronize


@pytest.mark.parametrize("kind", [AdamW, torch.optim.SGD])
def test_who_writes_on_the_host_waits_for_copies(apart: None, kind: Any) -> None:
    """Of a forward without a backward, behind which nothing waits."""
    model = made(param_dtype=BF16)
    model(INPUTS).sum().backward()
    store = compiled_model(model).session.store
    optimizer, lane = kind(model.parameters(), lr=1e-2), SlowLane()
    store.host.to_device = lane  # type: ignore[assignment]
    optimizer.step()
    assert lane.num_waits == 1
    model.load_state_dict(model.state_dict())
    assert lane.num_waits == 2
    store.copies.refresh()
    assert lane.num_waits == 3, "before anything is cast"
    shards.settle_host_memory()
    assert lane.num_waits > 3
