"""`zgraph hardware`: which profiles there are, what one says, and a new one; and a GPU that has none."""

import json
import tomllib
import warnings
from types import SimpleNamespace

import pytest
import torch

from zgraph.bridge.target import cost_table
from zgraph.cost import hardware, known
from zgraph.cost.hardware import load


def test_the_list(zgraph_command):
    code, out, _ = zgraph_command("hardware", "list")
    assert code == 0
    assert all(f"│ {name} " in out for name in known())
    (row,) = [line for line in out.splitlines() if line.startswith("│ h100 ")]
    assert "80.0 GiB" in row
    assert "989 TFLOP/s" in row
    code, out, _ = zgraph_command("hardware", "list", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert set(known()) <= rows.keys()
    assert rows["l4"]["device"]["peak_flops"]["bf16"] == 1.21e14


def test_one_is_shown_with_its_source(zgraph_command):
    code, out, _ = zgraph_command("hardware", "show", "2x4-mi325x")
    assert code == 0
    found = tomllib.loads(out)
    assert "AMD Instinct MI325X data sheet" in found["source"]
    assert (found["num_hosts"], found["devices_per_host"]) == (2, 4)
    assert json.loads(zgraph_command("hardware", "show", "h20", "--json")[1]) == hardware("h20").model_dump(mode="json")


@pytest.mark.parametrize("like", ["h100", "2x4-l40s"])
def test_a_new_one_is_the_other_under_its_own_name(like, zgraph_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = zgraph_command("hardware", "new", "mine", "--from", like, "-o", "own.toml")
    assert code == 0
    assert 'hardware="own.toml"' in out
    made = load(tmp_path / "own.toml")
    assert made.name == "mine"
    assert like in made.source
    same = made.model_copy(update={"name": hardware(like).name, "source": hardware(like).source})
    assert same == hardware(like)
    assert zgraph_command("hardware", "new", "mine", "-o", "own.toml")[0] == 2
    assert tomllib.loads(zgraph_command("hardware", "new", "mine", "-o", "-")[1])["name"] == "mine"
    assert zgraph_command("hardware", "new", "mine")[0] == 0
    assert (tmp_path / "mine.toml").exists()


def test_comments_go_with_a_copy(zgraph_command):
    assert "# one device, one direction" in zgraph_command("hardware", "new", "mine", "--from", "b200", "-o", "-")[1]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("lst",), "did you mean list?"),
        (("show", "h10"), "did you mean h100"),
        (("new", "mine", "--from", "b20"), "did you mean b200"),
        (("new", "h100"), "is a profile's already"),
        (("new", "My GPU"), "small letters"),
        (("new", "mine", "-o", "nowhere/mine.toml"), "cannot write"),
    ],
)
def test_mistakes(args, said, zgraph_command):
    code, _, error = zgraph_command("hardware", *args)
    assert code == 2
    assert said in " ".join(error.split())


def gpu(monkeypatch, title: str, num_gib: float) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: title)
    found = SimpleNamespace(total_memory=int(num_gib * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)


@pytest.mark.parametrize(("title", "num_gib", "name"), [("Tesla T4", 15, "a100-40"), ("NVIDIA H100 PCIe", 80, "h100")])
def test_a_gpu_without_a_profile_is_told_of(title, num_gib, name, monkeypatch):
    gpu(monkeypatch, title, num_gib)
    with pytest.warns(UserWarning, match=f"that of this {title}.*links of {name}.*zgraph.profile.*hardware=") as told:
        found = cost_table(None, torch.device("cuda", 0)).hardware
    assert len(told) == 1
    assert found.name == "unknown-" + title.lower().replace(" ", "-")
    assert found.device.memory_bytes == num_gib * 2**30


def test_a_gpu_with_a_profile_is_not(monkeypatch):
    gpu(monkeypatch, "NVIDIA L40S", 44.4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cost_table(None, torch.device("cuda", 0)).hardware.name == "l40s"
        assert cost_table("h100", torch.device("cuda", 0)).hardware.name == "h100"
