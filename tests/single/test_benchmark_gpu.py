"""The benchmark for GPUs, tried on a processor with tiny shapes."""

import json
from pathlib import Path

import pytest
import torch
import typer
from torch import nn

from benchmarks import clock, gpu
from benchmarks.clock import Clock, Taken, compare
from benchmarks.contenders import made_on
from benchmarks.groups import SwiGlu
from zgraph.cost import CostTable, hardware


def run(path: Path, only: list[str], systems: list[str]) -> dict[str, dict[str, dict]]:
    """Rows of the JSON by thing and system."""
    gpu.main(only, systems, "cpu", True, None, rounds=1, steps=2, warmup=1, json_file=path)
    found: dict[str, dict[str, dict]] = {}
    for row in json.loads(path.read_text())["rows"]:
        found.setdefault(row["thing"], {})[row["system"]] = row
    return found


def test_groups_updates_and_whole_steps_are_measured(tmp_path):
    only = ["residual + rmsnorm", "relu mlp", "adamw over shards, llama", "training"]
    found = run(tmp_path / "gpu.json", only, ["eager", "zgraph triton", "torch f", "_addmm"])
    assert [(name, *rows) for name, rows in found.items()] == [
        ("residual + rmsnorm", "eager", "zgraph triton"),
        ("relu mlp", "eager", "torch _addmm_activation", "zgraph triton"),
        ("AdamW over shards", "torch foreach", "torch fused", "zgraph triton"),
        ("training step", "eager", "zgraph triton"),
    ]
    for rows in found.values():
        first, *others = rows.values()
        assert first["vs_eager"] == 1
        for row in others:
            assert row["error"] is None
            assert row["step_low_s"] <= row["step_s"] <= row["step_high_s"]
            assert row["of_roofline"] == pytest.approx(row["bound_s"] / row["step_s"])
            assert row["vs_eager"] == pytest.approx(row["step_s"] / first["step_s"])
            assert row["difference"] < 1e-2, "as far as bf16 reads numbers alike"


def test_a_system_that_fails_is_a_row_that_says_why():
    class Good:
        def __call__(self) -> None: ...

        def results(self) -> list[torch.Tensor]:
            return [torch.ones(3)]

    class Late(Good):
        calls = 0

        def __call__(self) -> None:
            self.calls += 1
            if self.calls > 6:
                raise RuntimeError("one line\nand the last")

    def bad() -> Good:
        raise ValueError("no such kernel")

    found = compare({"good": Good, "bad": bad, "late": Late}, Clock(torch.device("cpu"), is_cold=True), 2, 3, 2)
    assert found["good"] == Taken(found["good"].seconds, found["good"].host_s)
    assert len(found["good"].seconds) == 6
    assert found["bad"].error == "ValueError: no such kernel"
    assert found["late"].error == "RuntimeError: and the last"
    thing = gpu.Thing("thing", "model", lambda device: {}, lambda costs: 1.0)
    assert [(row.system, row.step_s is None, row.error) for row in gpu.rows(thing, found, 1.0)] == [
        ("good", False, None),
        ("bad", True, found["bad"].error),
        ("late", True, found["late"].error),
    ]
    assert clock.difference([torch.ones(4), torch.full((4,), 3.0)], [torch.ones(4), torch.full((4,), 2.0)]) == 0.5


def test_the_roofline_of_a_group_is_its_bytes_or_its_flop():
    costs = CostTable(hardware=hardware("h100"))
    device = costs.hardware.device
    with made_on(gpu.META, torch.bfloat16):
        gate, up = (torch.zeros(512, 1024, requires_grad=True) for _ in range(2))
        glue_s = gpu.roofline_s(SwiGlu(), (gate, up), costs)
        matmul_s = gpu.roofline_s(nn.Linear(1024, 4096, bias=False), (gate,), costs)
    assert glue_s == pytest.approx(8 * 512 * 1024 * 2 / device.memory_bytes_per_s)
    assert matmul_s == pytest.approx(3 * 2 * 512 * 1024 * 4096 / device.matmul_flops["bf16"], rel=0.2)


def test_what_cannot_be_measured_is_refused(capsys):
    for options, why in (
        ({"device": "cpu"}, "NoGpu: these shapes are too large for a processor"),
        ({"device": "cpu", "is_tiny": True, "only": ["convolution"]}, "UnknownName: nothing is called 'convolution'"),
        *([] if torch.cuda.is_available() else [({}, "finds no GPU")]),
    ):
        with pytest.raises(typer.Exit):
            gpu.main(**options)
        assert why in capsys.readouterr().err
