"""A run that was saved runs again: the last graph of the file, without the passes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zgraph
from zgraph.compiler.report import Report
from zgraph.errors import RunFileError, VerifyError
from zgraph.estimate.trace import traced
from zgraph.passes import RECIPES, parse_recipe
from zgraph.runfile.format import load_run


class Small(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8 if not i else width, width) for i in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = nn.functional.gelu(layer(x))
        return x.square().mean()


def batch(step: int = 0) -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(step))


def trained(width: int = 16, **options: Any) -> tuple[list[float], Report, nn.Module]:
    """The losses of a few steps."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = zgraph.compile(Small(width), **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(3):
        loss = model(batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, zgraph.report(model), model


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.zg"


def test_a_saved_run_is_replayed(path):
    """To the last bit; evaluation, which the file does not hold, goes through the recipe."""
    first, saved, _ = trained(stage=3, save=path)
    second, replayed, model = trained(passes=path)
    assert second == first
    (ours,), (theirs,) = saved.entries, replayed.entries
    assert ours.plan.fingerprint == theirs.plan.fingerprint
    assert ours.steps
    assert not theirs.steps
    found = load_run(path)
    assert found.recipe == RECIPES[3]
    assert found.manifest.provenance.torch == torch.__version__
    with torch.no_grad():
        assert model(batch()).isfinite()


def test_graphs_after_the_first_have_numbers(path):
    _, _, model = trained(save=path)
    with torch.no_grad():
        model(batch())
    assert sorted(p.name for p in path.parent.iterdir()) == ["run-1.zg", "run.zg"]


def test_what_the_file_holds_last_is_what_runs(path, monkeypatch):
    """A user may edit the text of a plan; what computes something else is refused, unless they ask for it."""
    plain, _, _ = trained(save=path)
    run = load_run(path)
    member = run.manifest.snapshots[-1].member
    assert "aten.gelu.default" in run.texts[member]
    run.texts[member] = run.texts[member].replace("aten.gelu.default", "aten.silu.default")
    run.save(path)
    with pytest.raises(VerifyError, match=r"(?s)equality.*ZGRAPH_VERIFY=0 runs the graph as it is"):
        trained(passes=path)
    monkeypatch.setenv("ZGRAPH_VERIFY", "0")
    assert trained(passes=path)[0] != plain


def test_another_model_is_refused(path):
    trained(save=path)
    with pytest.raises(RunFileError, match=r"(?s)of another model.*line \d+ is"):
        trained(width=24, passes=path)
    with pytest.raises(RunFileError, match="cannot read"):
        trained(passes=path.with_name("nothing.zg"))


def test_a_run_traced_elsewhere_runs_here(path):
    """On a laptop first, under fake tensors; then on the ranks that it was traced for."""
    torch.compiler.reset()
    with torch.device("meta"):
        model = Small()
    for num_ranks, name in ((1, "one.zg"), (2, "two.zg")):
        run = traced(model, {"x": batch()}, parse_recipe(RECIPES[3]), hardware="cpu", num_ranks=num_ranks)
        run.save(path.with_name(name))
    assert trained(passes=path.with_name("one.zg"))[0] == pytest.approx(trained()[0], rel=1e-6)
    with pytest.raises(RunFileError, match="for 2 ranks, and here are 1"):
        trained(passes=path.with_name("two.zg"))


def test_runs_are_dumped(tmp_path, monkeypatch):
    monkeypatch.setenv("ZGRAPH_DUMP", str(tmp_path))
    _, report, _ = trained()
    (path,) = (tmp_path / "rank0").glob("*.zg")
    assert load_run(path).graph() == report.entries[0].plan.graph
