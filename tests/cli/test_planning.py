"""`zgraph plan`: one plan, and many side by side."""

import json
import os
import re

import pytest
import torch

import zgraph
from zgraph.cost import hardware
from zgraph.estimate import plan as planning

TINY = ("plan", "model.py:words", "--seq", "16", "--stage", "3", "--dtype", "f32")


@pytest.fixture
def captures(monkeypatch):
    """Counts how often a model is captured, in one process."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    seen = []
    capture = planning.capture_samples
    monkeypatch.setattr(planning, "capture_samples", lambda *args: seen.append(args) or capture(*args))
    return seen


def test_a_sweep(zgraph_command, captures):
    """One capture a batch; every row is what planning it alone gives; and what is recommended is best."""
    code, out, error = zgraph_command(
        *TINY, "--hardware", "2x2-h100", "--sweep", "--batch", "1", "--batch", "3", "--json"
    )
    assert code == 0, error
    assert len(captures) == 2
    found = json.loads(out)
    rows = found["combinations"]
    assert [(r["hardware"], r["num_ranks"], r["batch"]) for r in rows] == [
        (f"{hosts}x2-h100", 2 * hosts, batch) for hosts in (1, 2, 4) for batch in (1, 3)
    ]
    model = captures[0][0]
    ids = torch.zeros(3, 16, dtype=torch.int64)
    alone = zgraph.plan(model, input_ids=ids, labels=ids, hardware="2x2-h100", stage=3, param_dtype=torch.float32)
    (row,) = [r for r in rows if (r["hardware"], r["batch"]) == ("2x2-h100", 3)]
    assert row["stage"]["total_bytes"] == alone.stages[0].total_bytes
    seconds = alone.stages[0].total_us / 1e6
    assert row["items_per_s"] == pytest.approx(4 * 3 * 16 / seconds)
    matmuls = 3 * 2 * (3 * 16) * 32 * 64  # of the head: its output, and the gradients of its weight and input
    peak = hardware("h100").device.peak_flops["f32"]
    assert row["utilisation"] == pytest.approx(matmuls / seconds / peak)
    fastest, smallest = rows[found["fastest"]], rows[found["smallest"]]
    assert fastest["items_per_s"] == max(r["items_per_s"] for r in rows)
    assert (smallest["num_ranks"], smallest["batch"]) == (2, 3)
    assert "the fastest that fits: 4x2-h100 (8 ranks) with batch 3" in found["reason"]
    assert "the fewest ranks: 1x2-h100 (2 ranks)" in found["reason"]


def test_what_does_not_fit_is_no_recommendation(zgraph_command):
    """The exit code says so for one plan and for many."""
    code, out, _ = zgraph_command(*TINY, "--offload", "none", "--memory-budget", "20KiB")
    assert code == 3
    assert "Words, 0.00 million parameters on 8 ranks" in out
    assert "no stage fits" in out
    code, out, _ = zgraph_command(
        *TINY, "--offload", "none", "--memory-budget", "20KiB", "--hardware", "1x2-h100", "--hardware", "1x4-h100"
    )
    assert code == 3
    assert "nothing fits" in out
    assert len(re.findall(r"no │$", out, re.M)) == 2


def test_a_model_with_its_own_inputs_is_tried_on_other_hardware(zgraph_command, captures):
    code, out, _ = zgraph_command(
        "plan", "model.py:gone", "--hardware", "1x2-h100", "--sweep", "--stage", "2", "--dtype", "f32", "--json"
    )
    assert code == 0
    assert len(captures) == 1
    found = json.loads(out)
    assert found["unit"] == "rows"
    assert [(r["num_ranks"], r["batch"]) for r in found["combinations"]] == [(2, 8), (4, 8)]


def test_one_plan_as_json(zgraph_command):
    code, out, _ = zgraph_command(
        "plan", "model.py:gone", "--world", "2", "--stage", "0", "--stage", "2", "--dtype", "f32", "--json"
    )
    assert code == 0
    found = json.loads(out)
    assert [s["stage"] for s in found["stages"]] == [0, 2]
    assert found["num_ranks"] == 2
    assert found["num_parameters"] == 3 * (64 * 64 + 64)
    assert found["stages"][found["best"]]["fits"]
    assert "the fastest that fits" in found["reason"]


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("model.py:gone", "--batch", "1", "--batch", "2"), 2, "have the function return the model alone"),
        (("model.py:gone", "--batch", "4"), 2, "so that --batch would change nothing"),
        (("model.py:gone", "--seq", "64", "--sweep"), 2, "so that --seq would change nothing"),
        (("model.py:other", "--stage", "3"), 2, "Other.forward(idx, targets=None) does not take"),
        (("model.py:gone", "--dtype", "f8"), 2, "--dtype is one of"),
        (("model.py:gone", "--offload", "everything"), 2, "offload must be"),
        (("model.py:gone", "--hardware", "h10"), 2, "did you mean h100?"),
        (("model.py:gone", "--hardware", "2x8-h100", "--world", "12"), 2, "do not fill hosts"),
        (("model.py:gone", "--memory-budget", "lots"), 2, "memory_budget must be"),
    ],
)
def test_mistakes(args, code, said, zgraph_command):
    got, _, error = zgraph_command("plan", *args)
    assert got == code, error
    assert said in " ".join(error.split())


def test_how_long_so_many_tokens_take(zgraph_command):
    alone = (*TINY, "--hardware", "2x2-h100", "--batch", "3")
    _, out, _ = zgraph_command(*alone, "--json", "--sweep")
    (row,) = [r for r in json.loads(out)["combinations"] if r["hardware"] == "2x2-h100"]
    _, out, _ = zgraph_command(*alone, "--tokens", "3T")
    days, hours = re.search(r"3,000,000,000,000 tokens in ([\d,.]+) days .*, ([\d,]+) device-hours", out).groups()
    expected = 3e12 / row["items_per_s"] / 86400
    assert float(days.replace(",", "")) == pytest.approx(expected, rel=0.02)
    assert float(hours.replace(",", "")) == pytest.approx(96 * expected, rel=1e-3)
    for wrong in ("many", "-3", "nan", "inf", "3X"):
        code, _, error = zgraph_command(*alone, "--tokens", wrong)
        assert code == 2
        assert "--tokens must be" in error
