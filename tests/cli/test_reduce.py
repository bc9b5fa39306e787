"""A graph of 2,000 nodes on which something fails becomes a few nodes on which the same fails."""

import json
import sys
from pathlib import Path

import pytest

from zgraph.debugging import Failure, Passed, bisect, differs, reduce, reference
from zgraph.debugging.bisection import run_steps
from zgraph.debugging.ddmin import minimal
from zgraph.errors import UsageError
from zgraph.ir import Axis, Graph, parse_graph, print_graph, verify
from zgraph.passes import BY_NAME, Context, Pipeline
from zgraph.runfile.format import Provenance, load_run, run_file

from .graphs import long
from .wrong import Wrong

FULL = "canonicalize,{},partition(stage=3),bucket,all-gather,reduce-scatter,all-reduce,release,dce,arena"


def failing(mistake: str, recipe: str = FULL, num_ranks: int = 1) -> Passed:
    pipeline = Pipeline.parse(recipe.format(f"wrong(mistake={mistake})"), {**BY_NAME, "wrong": Wrong})
    return Passed(pipeline, Context(mesh=(Axis("shard", num_ranks),) if num_ranks > 1 else ()), num_ranks)


@pytest.mark.parametrize(
    ("mistake", "num_ranks", "kind", "ops"),
    [
        ("constant", 2, "differs", ["mul"]),
        ("missing", 1, "invalid", ["mul", "add"]),
        ("crash", 2, "raises", ["mm", "tanh", "neg"]),
    ],
)
def test_two_thousand_nodes_become_a_few(mistake, num_ranks, kind, ops):
    assert len(long().nodes) == 2000
    said = []
    check = failing(mistake, num_ranks=num_ranks)
    small, failure = reduce(long(), check, tell=said.append)
    assert failure.kind == kind
    assert [n.op.split(".")[1] for n in small.nodes] == ops, print_graph(small)
    assert len(small.inputs) <= 3
    verify(small)
    assert parse_graph(print_graph(small)) == small
    assert check.failure(small).is_like(failure)
    assert len(said) < 150


def test_what_is_left_is_wrong_in_the_same_rewrite():
    check = failing("constant")
    small, _ = reduce(long(), check)
    known = reference(small)
    culprit = bisect(known, run_steps(small, check.pipeline, check.context))
    assert culprit.step == "wrong(mistake=constant)"
    assert differs(known, run_steps(small, check.pipeline, check.context).graphs[-1][1]).error > 0.1


def test_other_failures_are_not_followed():
    """Parts of the graph that fail in another way are not smaller ways to fail."""

    class Judge:
        def failure(self, graph: Graph) -> Failure:
            ops = [n.op for n in graph.nodes]
            if len(ops) >= 7 and "aten.neg.default" in ops:
                return Failure.raised(LookupError(f"no pattern for {len(ops)} nodes"))
            return Failure.raised(LookupError("no pattern"))

    small, failure = reduce(long(), Judge())
    assert failure.message == "LookupError: no pattern for 2000 nodes"
    assert len(small.nodes) == 7


def test_nothing_fails():
    with pytest.raises(UsageError, match="nothing fails"):
        reduce(long(), failing("none", "canonicalize,{}"))


@pytest.mark.parametrize("culprits", [[], [0], [999], [3, 700], [1, 2, 500, 998]])
def test_delta_debugging_finds_all_that_is_needed_and_no_more(culprits):
    tried = []

    def fails(items):
        tried.append(items)
        return set(culprits) <= set(items)

    assert minimal(range(1000), fails) == culprits
    assert len(tried) <= 25 + 50 * len(culprits)
    assert len(tried) == len(set(map(tuple, tried)))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.py").write_text(Path(__file__).with_name("wrong.py").read_text())
    run_file([("captured", long(), 0.0)], Provenance(model="Long"), Context()).save(Path("run.zg"))
    return tmp_path


def test_the_command_writes_a_run_that_fails_alike(folder, command):
    args = ("--load", "wrong.py", "--passes", "canonicalize,wrong(mistake=constant),dce", "-o", "small.zg")
    code, out, error = command("reduce", "run.zg", *args)
    assert code == 0, error
    assert "2,000 nodes became 1, which fail so: output" in " ".join(error.split())
    run = load_run(Path("small.zg"))
    assert print_graph(run.graph("captured")) == out
    assert run.names == ("captured", "canonicalize", "wrong", "dce")
    code, out, _ = command("bisect", "small.zg", "--json")
    assert (code, json.loads(out)["culprit"]["step"]) == (1, "wrong(mistake=constant)")


def test_a_command_says_what_fails(folder, command):
    (folder / "check.py").write_text(
        "import sys, zipfile\n"
        "text = zipfile.ZipFile(sys.argv[1]).read('graphs/00-captured.zir').decode()\n"
        "sys.exit(3 if 'aten.neg' in text else 0)\n"
    )
    check = f"{sys.executable} -S check.py {{}}"
    code, out, error = command("reduce", "run.zg", "--check", check, "--json")
    assert code == 0, error
    found = json.loads(out)
    assert (found["nodes_before"], found["nodes"]) == (2000, 1)
    assert found["failure"]["message"].startswith("exit code 3")
    assert "aten.neg.default" in found["graph"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--check", "true {}", "--passes", "dce"), "give one of them"),
        (("--check", "true {}"), "nothing fails on this graph"),
        (("--check", "no-such-command {}"), "cannot run no-such-command"),
        ((), "say what fails: --passes RECIPE, or --check"),
    ],
)
def test_what_is_used_wrongly(args, said, folder, command):
    code, _, error = command("reduce", "run.zg", *args)
    assert (code, said in " ".join(error.split())) == (2, True), error
