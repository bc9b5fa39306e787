"""Where a model is sharded to: what `device=` means, and what NCCL is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import zgraph
from zgraph.bridge import private_runtime
from zgraph.errors import UsageError
from zgraph.options.settings import device_for

from .nets import Mlp

CPU, META = torch.device("cpu"), torch.device("meta")


def with_gpus(monkeypatch: pytest.MonkeyPatch, current: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (None, CPU),
        ("cpu", CPU),
        (CPU, CPU),
        ("cuda", torch.device("cuda", 3)),
        ("cuda:1", torch.device("cuda", 1)),
        (torch.device("cuda"), torch.device("cuda", 3)),
    ],
)
def test_the_device(wanted: Any, found: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 3)
    assert device_for(Mlp(), None, wanted) == found


def test_a_model_without_memory_goes_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 0)
    with META:
        model = Mlp()
    assert device_for(model, None, "cpu") == CPU
    assert device_for(model, None, None) == torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("gpu", 'such as "cuda" or "cpu"'),
        (3.5, "not 3.5"),
        ("meta", "a GPU or a processor"),
        ("cuda", "torch sees no GPU here"),
    ],
)
def test_devices_that_are_none(wanted: Any, words: str) -> None:
    model = nn.Linear(3, 1)
    with pytest.raises(UsageError, match=words):
        zgraph.compile(model, device=wanted)
    zgraph.compile(model)(torch.ones(2, 3)).sum().backward()


def test_a_mesh_of_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 0)
    mesh: Any = SimpleNamespace(device_type="cpu")
    with pytest.raises(UsageError, match='make the mesh with "cuda"'):
        device_for(Mlp(), mesh, "cuda")


def test_one_parameter_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters and buffers that are elsewhere are brought one by one; those that are there stay what they are."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    held = {n: p.data_ptr() for n, p in (*model.named_parameters(), *model.named_buffers())}
    zgraph.compile(model, device="cpu")
    assert {n: p.data_ptr() for n, p in (*model.named_parameters(), *model.named_buffers())} == held
    assert model(torch.ones(2, 3)).sum().requires_grad


@pytest.mark.parametrize(
    ("backend", "device"),
    [("gloo", None), ("nccl", torch.device("cuda", 2)), ("cpu:gloo,cuda:nccl", torch.device("cuda", 2))],
)
def test_nccl_is_told_its_device(backend: str, device: torch.device | None, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 2)
    said: dict[str, Any] = {}
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **options: said.update(options))
    monkeypatch.setattr(dist.distributed_c10d, "_set_pg_timeout", lambda timeout: None)
    private_runtime.init_group(backend, dist.HashStore(), 0, 2, None)
    assert said["device_id"] == device
