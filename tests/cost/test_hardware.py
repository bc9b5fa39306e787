"""Profiles: every built-in one reads, names are parsed, what is wrong is told."""

import pytest

from zgraph.cost import CostTable, Line, hardware, known, load_table, save_table
from zgraph.cost.hardware import load, save
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
    assert {"a100-40", "a100-80", "h100", "h200", "b200", "mi300x"} <= set(known())


def test_a_name_says_how_many():
    profile = hardware("16x8-a100-80")
    assert (profile.num_hosts, profile.devices_per_host, profile.num_devices) == (16, 8, 128)
    assert profile.spread(32) == (4, 8)
    assert profile.spread(4) == (1, 4)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("h10", "did you mean h100"),
        ("potato", "the profiles are a100-40, a100-80"),
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
        hardware=hardware("cpu"), ops={"aten.mm.default(f32[2x2])": 3.5},
        transfers={"all_gather": Line(latency_us=1.0, bytes_per_s=2.0)},
    )  # fmt: skip
    save_table(table, tmp_path / "table.json")
    assert load_table(tmp_path / "table.json") == table
    (tmp_path / "none.json").write_text("{}")
    with pytest.raises(HardwareError, match="is no cost table"):
        load_table(tmp_path / "none.json")
