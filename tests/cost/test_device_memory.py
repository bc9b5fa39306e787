"""How much of a GPU a plan may fill, and what libraries take of it."""

from types import SimpleNamespace

import pytest
import torch

from zgraph.bridge import target
from zgraph.cost import hardware
from zgraph.cost.reserved import beside_bytes

GIB, MIB = 1 << 30, 1 << 20
GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("memory_gib", "num_ranks", "share"), [(141, 8, 0.94), (80, 8, 0.94), (24, 8, 0.925), (24, 1, 0.94), (16, 8, 0.909)]
)
def test_small_gpus_keep_what_libraries_need(monkeypatch, memory_gib, num_ranks, share):
    properties = SimpleNamespace(total_memory=memory_gib * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    found = target.device_budget(GPU, num_ranks)
    assert found == pytest.approx(share * memory_gib * GIB, rel=0.006)
    assert memory_gib * GIB - found >= beside_bytes(num_ranks) - 100 * MIB


def test_a_plan_for_a_gpu_has_the_budget_of_the_gpu(monkeypatch):
    profile = hardware("rtx-4090")
    properties = SimpleNamespace(total_memory=profile.device.memory_bytes)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert target.planned_budget(profile, 2) == target.device_budget(GPU, 2)
    assert target.planned_budget(hardware("cpu"), 2) == int(0.94 * hardware("cpu").device.memory_bytes)
    assert target.device_budget(torch.device("cpu"), 2) is None


@pytest.mark.parametrize(
    ("capability", "config", "num_bytes"),
    [
        ((9, 0), None, 32 * MIB),
        ((10, 3), None, 32 * MIB),
        ((8, 9), None, 8320 << 10),
        ((8, 0), ":4096:8", 32 * MIB),
        ((9, 0), ":16:8", 128 << 10),
        ((9, 0), ":4096:2:16:8", (4096 * 2 + 16 * 8) << 10),
    ],
)
def test_what_the_matmul_library_keeps(monkeypatch, capability, config, num_bytes):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if config is not None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", config)
    assert target.library_bytes(GPU) == num_bytes
    assert target.library_bytes(torch.device("cpu")) == 0


@pytest.mark.parametrize(("arch", "mib"), [("gfx942:sramecc+", 128), ("gfx90a", 32)])
def test_what_it_keeps_on_gpus_of_amd(monkeypatch, arch, mib):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=arch))
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert target.library_bytes(GPU) == mib * MIB


def test_expandable_segments_are_advised_where_nothing_is_said_of_them(monkeypatch):
    for name in target.ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    assert "PYTORCH_ALLOC_CONF=expandable_segments:True" in target.allocator_advice(GPU)
    assert target.allocator_advice(torch.device("cpu")) == ""
    for name in target.ALLOCATOR:
        with monkeypatch.context() as patched:
            patched.setenv(name, "max_split_size_mb:512,expandable_segments:False")
            assert target.allocator_advice(GPU) == "", "the user has chosen"
