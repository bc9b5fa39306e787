"""Profiles: every built-in one reads, names are parsed, what is wrong is told."""

from types import SimpleNamespace

import pytest
import torch

from zgraph.bridge.target import cost_table
from zgraph.cost import AlphaBeta, CostTable, hardware, known, load_table, save_table
from zgraph.cost.hardware import load, recognised, save
from zgraph.errors import HardwareError


@pytest.mark.parametrize("name", known())
def test_every_profile_is_possible(name):
    profile = hardware(name)
    assert profile.name == name
    assert profile.source
    device = profile.device
    assert all(device.matmul_flops[d] <= device.peak_flops[d] for d in device.matmul_flops)
    assert profile.within.bytes_per_s >= profile.between.bytes_per_s


def test_the_profiles_that_were_promised():
    assert {
        "a10",
        "a100-40",
        "a100-80",
        "b200",
        "gb200",
        "gb300",
        "h100",
        "h100-nvl",
        "h20",
        "h200",
        "l4",
        "l40s",
        "mi250x",
        "mi300x",
        "mi325x",
        "rtx-4090",
        "rtx-5090",
        "v100",
        "v100-16",
    } <= set(known())


@pytest.mark.parametrize(
    ("name", "bf16", "memory_gb", "gb_per_s"),
    [
        ("l4", 121, 24, 300),
        ("l40s", 362, 48, 864),
        ("a10", 125, 24, 600),
        ("rtx-4090", 165.2, 25.8, 1008),
        ("rtx-5090", 209.5, 34.4, 1792),
        ("h100-nvl", 835.5, 100.9, 3900),
        ("h20", 148, 103.1, 4000),
        ("gb200", 2500, 186, 8000),
        ("gb300", 2500, 279, 8000),
        ("mi250x", 191.5, 68.7, 1638),
        ("mi325x", 1307.4, 256, 6000),
    ],
)
def test_dense_figures_of_data_sheets(name, bf16, memory_gb, gb_per_s):
    """A rate with sparsity, as sheets print first, would be twice as much."""
    device = hardware(name).device
    assert device.peak_flops["bf16"] == pytest.approx(bf16 * 1e12, rel=1e-3)
    assert device.memory_bytes == pytest.approx(memory_gb * 1e9, rel=1e-2)
    assert 0.75 < device.memory_bytes_per_s / (gb_per_s * 1e9) < 0.9


def test_what_is_estimated_says_so():
    measured = {"a100-40", "a100-80", "b200", "cpu", "h100", "h200"}
    for name in set(known()) - measured:
        assert "estimated" in hardware(name).source or "assumed" in hardware(name).source, name


GIB = 2**30


@pytest.mark.parametrize(
    ("title", "memory_bytes", "found"),
    [
        ("NVIDIA A100-SXM4-40GB", 39.5 * GIB, ("a100-40", True)),
        ("NVIDIA A100-SXM4-80GB", 79.3 * GIB, ("a100-80", True)),
        ("NVIDIA H100 80GB HBM3", 79.6 * GIB, ("h100", True)),
        ("NVIDIA H100 NVL", 93.6 * GIB, ("h100-nvl", True)),
        ("NVIDIA H100 PCIe", 79.6 * GIB, ("h100", False)),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 9.8 * GIB, ("h100", False)),
        ("NVIDIA H200", 139.8 * GIB, ("h200", True)),
        ("NVIDIA H20", 95.1 * GIB, ("h20", True)),
        ("NVIDIA B200", 178.4 * GIB, ("b200", True)),
        ("NVIDIA GB200", 184 * GIB, ("gb200", True)),
        ("NVIDIA GB300", 277 * GIB, ("gb300", True)),
        ("NVIDIA A10", 22 * GIB, ("a10", True)),
        ("NVIDIA A10G", 22 * GIB, (None, False)),
        ("NVIDIA L4", 22 * GIB, ("l4", True)),
        ("NVIDIA L40S", 44.4 * GIB, ("l40s", True)),
        ("NVIDIA L40", 44.4 * GIB, (None, False)),
        ("NVIDIA GeForce RTX 4090", 23.6 * GIB, ("rtx-4090", True)),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.7 * GIB, ("rtx-4090", False)),
        ("NVIDIA GeForce RTX 5090", 31.4 * GIB, ("rtx-5090", True)),
        ("Tesla V100-SXM2-16GB", 15.8 * GIB, ("v100-16", True)),
        ("Tesla V100-SXM2-32GB", 31.7 * GIB, ("v100", True)),
        ("AMD Instinct MI250X", 64 * GIB, ("mi250x", True)),
        ("AMD Instinct MI300X", 192 * GIB, ("mi300x", True)),
        ("AMD Instinct MI325X", 256 * GIB, ("mi325x", True)),
        ("Tesla T4", 14.6 * GIB, (None, False)),
    ],
)
def test_devices_by_what_drivers_call_them(title, memory_bytes, found):
    assert recognised(title, int(memory_bytes)) == found


def test_a_name_says_how_many():
    profile = hardware("16x8-a100-80")
    assert (profile.num_hosts, profile.devices_per_host, profile.num_devices) == (16, 8, 128)
    assert profile.spread(32) == (4, 8)
    assert profile.spread(4) == (1, 4)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("h10", "did you mean h100"),
        ("potato", "the profiles are a10, a100-40, a100-80"),
        ("0x8-h100", "has no devices"),
        ("H100", "no hardware is called 'H100'"),
        ("nowhere.toml", "cannot read"),
    ],
)
def test_an_unknown_name_lists_the_known_ones(name, says):
    with pytest.raises(HardwareError, match=says):
        hardware(name)


def test_ranks_that_do_not_fill_hosts():
    with pytest.raises(HardwareError, match="12 ranks do not fill hosts of 8"):
        hardware("h100").spread(12)


def test_a_profile_comes_back_from_its_file(tmp_path):
    profile = hardware("2x4-h200")
    save(profile, tmp_path / "mine.toml")
    assert hardware(str(tmp_path / "mine.toml")) == profile


@pytest.mark.parametrize(("text", "says"), [("name = ", "is no TOML"), ('name = "x"', "device: Field required")])
def test_a_broken_profile_is_told(tmp_path, text, says):
    path = tmp_path / "broken.toml"
    path.write_text(text)
    with pytest.raises(HardwareError, match=says):
        load(path)


def test_a_table_comes_back_from_its_file(tmp_path):
    table = CostTable(
        hardware=hardware("cpu"),
        ops={"aten.mm.default(f32[2x2])": 3.5},
        transfers={"all_gather": AlphaBeta(latency_us=1.0, bytes_per_s=2.0)},
    )
    save_table(table, tmp_path / "table.json")
    assert load_table(tmp_path / "table.json") == table
    (tmp_path / "none.json").write_text("{}")
    with pytest.raises(HardwareError, match="is no cost table"):
        load_table(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("title", "memory_gib", "name"),
    [
        ("NVIDIA H100 80GB HBM3", 80, "h100"),
        ("NVIDIA GB999", 288, "unknown-nvidia-gb999"),
        ("NVIDIA H100 PCIe", 80, "unknown-nvidia-h100-pcie"),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", 40, "unknown-nvidia-a100-sxm4-80gb-mig-3g-40gb"),
        ("???", 4, "unknown-gpu"),
    ],
)
def test_a_gpu_without_a_profile_is_told_and_never_taken_for_another(monkeypatch, recwarn, title, memory_gib, name):
    """What is planned with then is named, as is where it is from; the memory is the GPU's own."""
    properties = SimpleNamespace(total_memory=memory_gib << 30)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: title)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    found = cost_table(None, torch.device("cuda", 0)).hardware
    assert found.name == name
    told = [str(w.message) for w in recwarn if "no hardware profile" in str(w.message)]
    assert len(told) == (name != "h100")
    if told:
        assert title in told[0]
        assert "zgraph.profile_machine()" in told[0]
        assert found.device.memory_bytes == memory_gib << 30
        assert title in found.source
        assert "a100" in found.source or "h100" in found.source
