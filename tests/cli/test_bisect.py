"""A wrong rewrite among many right ones is found with no hint, whatever it does and wherever it stands."""

import json
import random
import re
import shutil
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import zgraph
from tests.interp import models
from zgraph.debugging import Culprit, bisect, examine, reference
from zgraph.debugging.bisection import run_steps
from zgraph.debugging.hunks import Hunks
from zgraph.errors import BudgetError, CheckError
from zgraph.ir import Axis, Graph, parse_graph
from zgraph.passes import BY_NAME, RECIPES, Context, Pipeline, fusing
from zgraph.passes.core.pipeline import print_pass
from zgraph.runfile.format import Provenance, Recording
from zgraph.runfile.sources import sources_of

from .graphs import long
from .wrong import Wrong, WrongPartition

KNOWN = {**BY_NAME, Wrong.name: Wrong, WrongPartition.name: WrongPartition}
LOWER = "bucket,all-gather,reduce-scatter,all-reduce,release"
BEFORE = f"canonicalize,{{}},partition(stage=3),{LOWER},dce,arena"
BETWEEN = f"canonicalize,partition(stage=3),{{}},{LOWER},dce,arena"
AFTER = f"canonicalize,partition(stage=3),{LOWER},{{}},dce,arena"


class Net(nn.Module):
    """Products with a constant, differences, and two draws of random numbers a layer."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(num_layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x
        for layer in self.layers:
            h = nn.functional.dropout(torch.tanh(layer(h)) * 0.5) + nn.functional.dropout(h - x * h)
        return h.square().mean()


@cache
def captured() -> Graph:
    return zgraph.trace(Net(6), torch.rand(8, 8))


def context(num_ranks: int) -> Context:
    return Context(mesh=(Axis("shard", num_ranks),) if num_ranks > 1 else ())


def found(recipe: str, num_ranks: int, graph: Graph | None = None) -> Culprit | None:
    graph = graph or captured()
    steps = run_steps(graph, Pipeline.parse(recipe, KNOWN), context(num_ranks))
    return bisect(reference(graph, num_ranks), steps)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize(
    ("mistake", "recipe", "lines"),
    [
        ("operand", AFTER, ["- bwd %tanh_backward", "+ bwd %tanh_backward"]),
        ("scale", BETWEEN, ["- bwd %mul", "- bwd %tanh_backward", "+ bwd %tanh_backward"]),
        ("constant", BEFORE, ["0.5)", "0.25)"]),
        ("order", BETWEEN, ["> fwd %getitem_12: f32[8, 8]"]),
    ],
)
def test_a_wrong_rewrite_is_found(mistake, recipe, lines, num_ranks):
    step = print_pass(Wrong(mistake))
    culprit = found(recipe.format(step), num_ranks)
    assert culprit.step == step
    assert culprit.num_steps == 10
    assert culprit.failure.kind == "differs"
    assert culprit.failure.difference.error > 1e-3
    assert culprit.rewrite.num_rewrites > 20
    assert len(culprit.rewrite.lines) == len(lines), culprit.rewrite.lines
    assert all(part in line for part, line in zip(lines, culprit.rewrite.lines, strict=True)), culprit.rewrite.lines
    assert "test_bisect.py" in culprit.rewrite.sources[0]
    assert culprit.num_checks < 40


def test_one_of_hundreds_is_found():
    culprit = found(BEFORE.format("wrong(mistake=constant)"), 2, long(110))
    assert culprit.rewrite.num_rewrites > 200
    assert len(culprit.rewrite.lines) == 2
    assert culprit.num_checks < 40


def test_what_is_right_is_not_blamed():
    assert found(BEFORE.format("wrong(mistake=none)"), 2) is None
    assert found(RECIPES[1], 3) is None
    assert found(fusing(RECIPES[3]), 2, models.captured("llama")) is None


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_gradient_of_another_parameter_is_found(num_ranks):
    """In the pass that places everything on the ranks: the mesh is another before and after."""
    culprit = found(f"canonicalize,wrong-partition(stage=2),{LOWER},dce,arena", num_ranks)
    assert culprit.step == "wrong-partition(stage=2)"
    assert culprit.failure.difference.what.startswith("the gradient of layers.")
    changed = "reshard" if num_ranks > 1 else "return bwd grad"
    assert any(changed in line for line in culprit.rewrite.lines)
    assert len(culprit.rewrite.lines) <= 4, culprit.rewrite.lines


def test_graphs_that_are_not_valid_and_passes_that_raise():
    culprit = found(BETWEEN.format("wrong(mistake=missing)"), 2)
    assert (culprit.step, culprit.failure.kind) == ("wrong(mistake=missing)", "invalid")
    assert "nothing above it defines" in culprit.failure.message
    assert [line[0] for line in culprit.rewrite.lines] == ["-"]
    culprit = found(BETWEEN.format("wrong(mistake=nowhere)"), 2)
    assert (culprit.step, culprit.position, culprit.failure.kind) == ("wrong(mistake=nowhere)", 3, "raises")
    assert culprit.failure.message == "KeyError: 'nowhere'"
    assert culprit.rewrite is None


def test_what_made_a_later_pass_raise_is_found():
    culprit = found(BEFORE.format("wrong(mistake=constant),wrong(mistake=nowhere)"), 1)
    assert (culprit.step, culprit.failure.kind) == ("wrong(mistake=constant)", "differs")


@pytest.mark.parametrize("name", ["tied", "bf16"])
def test_some_of_what_right_passes_do_is_right(name):
    """Parts of a pass, applied without the others, give a graph that is not valid or one that is right."""
    graph, dice, valid = models.captured(name), random.Random(0), 0
    known = reference(graph, 2)
    steps = run_steps(graph, Pipeline.parse(RECIPES[3], KNOWN), context(2)).graphs
    for (_, before), (step, after) in pairwise(steps):
        hunks = Hunks(before, after)
        for _ in range(3):
            some = {number for number in range(len(hunks)) if dice.random() < 0.5}
            own = hunks.unchosen_outputs(some) if before.mesh != after.mesh else None
            failure = examine(known, hunks.apply(some), own=own)
            assert failure is None or failure.kind == "invalid", f"{step}: {failure}"
            valid += failure is None
        assert hunks.apply(range(len(hunks))) == after
    assert valid > 20


def test_what_cannot_be_checked_is_an_error():
    with pytest.raises(BudgetError, match=r"takes about 1MiB .* fewer layers.*--max-memory"):
        reference(captured(), 4, max_bytes=1000)
    text = 'graph "g"\nop aten.nothing.default\ninput %x: f32[4]\nfwd %y: f32[4] = aten.nothing.default(%x)\n'
    with pytest.raises(CheckError, match="no op called aten"):
        reference(parse_graph(text + "return fwd output %y\n"))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """With a run of the net, and a file of passes."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(Path(__file__).with_name("wrong.py"), "wrong.py")
    recording = Recording(captured(), sources=sources_of(captured()))
    Pipeline.parse(BEFORE.format("wrong(mistake=constant)"), KNOWN).run(captured(), context(2), [recording])
    recording.run_file(Provenance(model="Net"), context(2)).save(Path("run.zg"))
    return tmp_path


def test_the_command_finds_it_in_a_file_and_in_a_recipe(folder, command):
    code, out, error = command("bisect", "run.zg")
    assert code == 1, error
    assert re.search(r"pass +wrong\(mistake=constant\) \(2 of 10\)", out)
    assert re.search(r"rewrite +one part of \d+:\n +- \w+ %.* 0.5\)\n +\+ \w+ %.* 0.25\)\nsource .*test_bisect.py", out)
    args = ("--load", "wrong.py", "--passes", AFTER.format("wrong(mistake=scale)"), "--json", "--world", "1")
    code, out, error = command("bisect", "run.zg", *args)
    assert code == 1, error
    assert json.loads(out)["culprit"]["step"] == "wrong(mistake=scale)"
    assert json.loads(out)["culprit"]["position"] == 8
    code, out, error = command("bisect", "run.zg", "--passes", RECIPES[3])
    assert (code, out.partition(":")[0]) == (0, "nothing is wrong"), error


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("--max-memory", "1KiB"), 3, "fewer ranks with --world; or allow more with --max-memory"),
        (("--max-memory", "much"), 2, "--max-memory: much is no size"),
        (("--dtype", "bf16"), 2, "--dtype is one of f64, f32"),
        (("--load", "none.py"), 2, "there is no file none.py"),
        (("--load", "empty.py"), 2, "empty.py defines no pass"),
        (("--load", "broken.py"), 2, "broken.py cannot be imported: NameError"),
        (("--load", "taken.py"), 2, "taken.py defines a pass called dce, and there is one already"),
        (("--passes", "canonicalize,worng", "--load", "wrong.py"), 2, "did you mean wrong?"),
    ],
)
def test_what_is_used_wrongly(args, code, said, folder, command):
    Path("empty.py").write_text("")
    Path("broken.py").write_text("Pass")
    Path("taken.py").write_text(Path("wrong.py").read_text().replace('= "wrong"', '= "dce"'))
    got, _, error = command("bisect", "run.zg", *args)
    assert (got, said in " ".join(error.split())) == (code, True), error
