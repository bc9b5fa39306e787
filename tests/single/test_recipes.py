"""Recipes as text, and what the environment switches on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import zgraph
from zgraph.errors import UsageError
from zgraph.ir import parse_graph, print_graph
from zgraph.passes import parse_recipe

from .nets import Mlp, built, rows


@pytest.mark.parametrize("stage", range(4))
def test_a_stages_recipe_goes_round(stage: int) -> None:
    text = zgraph.recipe(stage)
    assert str(parse_recipe(text)) == text
    by_stage = zgraph.compile(built(Mlp), stage=stage)
    by_text = zgraph.compile(built(Mlp), passes=text)
    gradients = []
    for model in (by_stage, by_text):
        torch.manual_seed(0)
        model(*rows(0)).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    first, second = (zgraph.report(m) for m in (by_stage, by_text))
    assert first.recipe == second.recipe == text
    assert zgraph.recipe(stage) == second.recipe
    assert first.entries[0].plan.fingerprint == second.entries[0].plan.fingerprint


def test_a_recipe_of_no_stage() -> None:
    with pytest.raises(UsageError, match="0, 1, 2 or 3"):
        zgraph.recipe(4)


def test_dump_writes_a_text_for_each_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZGRAPH_DUMP", str(tmp_path))
    monkeypatch.setenv("ZGRAPH_VERIFY", "2")
    model = zgraph.compile(built(Mlp))
    model(*rows(0)).backward()
    files = sorted((tmp_path / "rank0").glob("*.zir"))
    names = [p.name for p in parse_recipe(zgraph.recipe(3)).passes]
    assert [f.stem.split("-", 3)[-1] for f in files] == ["captured", *names]
    for file in files:
        text = file.read_text()
        assert print_graph(parse_graph(text)) == text


def test_disable_leaves_a_pass_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZGRAPH_DISABLE", "schedule, dce")
    model = zgraph.compile(built(Mlp))
    model(*rows(0)).backward()
    steps = [s.text for s in zgraph.report(model).entries[0].steps]
    assert "canonicalize" in steps
    assert not {"schedule", "dce"} & set(steps)


@pytest.mark.parametrize(
    ("name", "value"), [("ZGRAPH_VERIFY", "3"), ("ZGRAPH_DISABLE", "schedulee"), ("ZGRAPH_TIMEOUT", "soon")]
)
def test_an_environment_that_means_nothing(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=name):
        zgraph.compile(built(Mlp))(*rows(0))
