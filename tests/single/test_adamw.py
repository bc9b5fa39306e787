"""AdamW with its state on the host or on disk, updated there or streamed: torch's fused AdamW to the last bit."""

import os
import shutil
from copy import deepcopy

import pytest
import torch
from torch import nn

from tests.deep import deep
from tests.single.trained import Trained, llama
from zgraph.errors import OffloadError, UsageError
from zgraph.optim import AdamW
from zgraph.runtime import host

PLACES = {
    "in place": {},
    "host": {"state": "host"},
    "host, streamed": {"state": "host", "update": "device", "chunk_bytes": 1000},
    "disk": {"state": "disk"},
    "disk, streamed": {"state": "disk", "access": "mapped", "update": "device", "chunk_bytes": 100_000},
    "disk, direct": {"state": "disk", "access": "direct", "chunk_bytes": 100},
    "disk, direct, streamed": {"state": "disk", "access": "direct", "update": "device", "chunk_bytes": 5000},
    "all streamed": {"update": "device", "state": "host", "chunk_bytes": 64},
}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 333), nn.Tanh(), nn.Linear(333, 3))


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[torch.Tensor]:
    for step in steps:
        for number, group in enumerate(optimizer.param_groups):
            group["lr"] = 0.9**step * (1e-3, 1e-2)[number]
        x = torch.randn(5, 7, generator=torch.Generator().manual_seed(step))
        (model(x) ** 2).mean().backward()
        if step == 1:
            model[0].bias.grad = None
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def groups(model: nn.Module) -> list[dict]:
    return [{"params": [model[0].weight, model[2].weight]}, {"params": [model[0].bias, model[2].bias], "lr": 1e-2}]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("place", PLACES)
def test_the_update_is_torchs(place, tmp_path):
    ours, theirs = net(), net()
    options = PLACES[place] | ({"folder": tmp_path} if PLACES[place].get("state") == "disk" else {})
    optimizer, reference = AdamW(groups(ours), lr=1e-3, **options), torch.optim.AdamW(groups(theirs), 1e-3, fused=True)
    assert same(run(ours, optimizer, range(4)), run(theirs, reference, range(4)))
    assert not list(tmp_path.iterdir())
    other = AdamW(groups(ours), lr=1e-3, **options)
    other.load_state_dict(reference.state_dict())
    assert same(run(ours, other, range(4, 6)), run(theirs, reference, range(4, 6)))
    reference.load_state_dict(deepcopy(other.state_dict()))
    other.load_state_dict(other.state_dict())
    assert same(run(ours, other, range(6, 8)), run(theirs, reference, range(6, 8)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        deep({"state": "host"}),
        {"state": "disk", "access": "direct"},
        deep({"state": "host", "update": "device"}),
    ],
)
def test_a_compiled_model_is_trained_the_same(options, tmp_path):
    if options.get("state") == "disk":
        options = options | {"folder": tmp_path}
    plain = Trained("llama", make_optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3, fused=True))
    offload = None if options.get("update") == "device" else "optimizer"
    moved = Trained("llama", make_optimizer=lambda m: AdamW(m.parameters(), lr=1e-3, **options), offload=offload)
    assert moved.losses == plain.losses


def test_bad_arguments_are_refused():
    model = net()
    for bad in (
        {"lr": -1},
        {"betas": (0.9, 1.0)},
        {"state": "gpu"},
        {"state": "disk"},
        {"folder": "x"},
        {"access": "direct"},
    ):
        with pytest.raises(UsageError):
            AdamW(model.parameters(), **bad)


def test_a_disk_without_room_or_leave_is_refused_and_nothing_is_left(tmp_path, monkeypatch):
    model = net()
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OffloadError, match="name another folder"):
        AdamW(model.parameters(), state="disk", folder=file)
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OffloadError, match="only 10 are free there"):
        AdamW(model.parameters(), state="disk", folder=tmp_path / "state")
    monkeypatch.undo()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OffloadError, match="No space left"):
        AdamW(llama().parameters(), state="disk", folder=tmp_path / "state")
    assert not list((tmp_path / "state").iterdir())


def test_a_file_system_without_direct_access_is_refused_only_where_that_was_asked_for(tmp_path, monkeypatch):
    really = os.open

    def refuse(path, flags, *rest, **named):
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return really(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(host, "available_bytes", lambda: 0)
    with pytest.raises(OffloadError, match='take access="mapped"'):
        AdamW(net().parameters(), state="disk", access="direct", folder=tmp_path)
    ours, theirs = net(), net()
    optimizer = AdamW(groups(ours), lr=1e-3, state="disk", folder=tmp_path)
    assert same(
        run(ours, optimizer, range(2)), run(theirs, torch.optim.AdamW(groups(theirs), 1e-3, fused=True), range(2))
    )
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fails_is_told(tmp_path, monkeypatch):
    model = net()
    optimizer = AdamW(model.parameters(), state="disk", access="direct", folder=tmp_path)

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    model(torch.ones(1, 7)).sum().backward()
    with pytest.raises(OffloadError, match="go on from the last checkpoint"):
        optimizer.step()
