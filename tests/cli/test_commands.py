"""The `zgraph` command, as a user types it: every example of its help, its errors, and what it prints for programs."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import transformers as hf

import zgraph
from tests.cli.conftest import record_costs
from tests.cli.test_quantising import save_language_model
from zgraph.cli import main as _main  # noqa: F401 - adds the commands
from zgraph.cli.app import app
from zgraph.cli.models import subject
from zgraph.errors import VerifyError
from zgraph.ir import parse_graph, print_graph
from zgraph.passes import RECIPES
from zgraph.runfile.format import load_run


def commands() -> list[str]:
    return sorted(c.name or c.callback.__name__ for c in app.registered_commands)


@pytest.mark.parametrize("name", commands())
def test_the_example_of_every_command_runs(name, zgraph_command):
    code, text, _ = zgraph_command(name, "--help")
    assert code == 0
    (example,) = re.findall(r"Example: (zgraph .*)", re.sub(r"[│`]| +$", "", text, flags=re.M).replace("\n  ", " "))
    args = [a.replace("mm_3", "addmm_1") for a in shlex.split(example)[1:]]
    if name in ("serve", "chat"):
        pytest.skip("waits for somebody: test_serving.py runs it")
    if name == "top":
        pytest.skip("watches a job: test_pace.py runs it")
    if name == "trace":
        args[args.index("run.zg")] = "other.zg"
    if name == "calibrate":
        record_costs()
    if name == "plan":
        args += ["--stage", "3"]  # one is enough
    if name in ("quantise", "eval") and not Path("SmolLM2-135M").exists():
        save_language_model(Path("SmolLM2-135M"), width=64)
        Path("book.txt").write_text(" ".join(f"w{n % 64}" for n in range(3000)))
    code, out, error = zgraph_command(*args)
    assert code == 0, error
    assert out.strip()


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("shwo", "run.zg"), 2, "did you mean show?"),
        (("show", "rnu.zg"), 2, "did you mean run.zg?"),
        (("show", "run.zg@buckt"), 2, "did you mean bucket?"),
        (("opt", "run.zg", "--passes", "canonicalise"), 2, "did you mean canonicalize?"),
        (("opt", "run.zg", "--disable-pass", "buket"), 2, "did you mean bucket?"),
        (("opt", "run.zg", "--stop-after", "fuse"), 2, "not among the passes to run"),
        (("explain", "run.zg", "%adddmm"), 2, "did you mean addmm"),
        (("trace", "model.py:gon"), 2, "did you mean gone?"),
        (("trace", "nowhere.py:model"), 2, "there is no file nowhere.py"),
        (("trace", "model.py"), 2, "say which function of model.py makes the model: model.py:FUNCTION"),
        (("trace", "model.py:x"), 2, "model.py has no function x; it has Gone, gone, Words, words, fails, Other"),
        (("trace", "model.py:fails"), 2, "raised ZeroDivisionError: integer division or modulo by zero (model.py:33)"),
        (("trace", "model.py:gone", "--batch", "2", "--seq", "8"), 2, "so that --batch and --seq would change nothing"),
        (("trace", "model.py:other"), 2, "Other.forward(idx, targets=None) does not take what it is called with"),
        (("trace", "model.py:other"), 2, "a language model is called with input_ids, labels. Have the function return"),
        (("trace", "model.py:misnamed"), 2, "Gone.forward(x) does not take what it is called with: missing a required"),
        (("trace", "model.py:gone", "--dtype", "int8"), 2, "--dtype is one of bf16, f16, f32, f64"),
        (("show", "run.zg", "--phase", "bkw"), 2, "--phase is one of fwd, bwd, upd, not bkw"),
        (("opt", "run.zg", "-o", "llama-70b"), 2, "cannot write llama-70b: Is a directory"),
        (("trace", "no-such-folder/config.json"), 2, "Give a folder with a config.json"),
        (("trace", "model.py:gone", "--hardware", "2x4-a100"), 2, "did you mean a100-40?"),
        (("trace", "model.py:gone", "--memory-budget", "9KiB", "-o", "x.zg"), 3, "the smallest that can"),
        (("trace", "model.py:gone", "--stage", "7"), 2, "--stage"),
        (("trace", "model.py:gone", "--world", "3", "--context-parallel", "2"), 2, "do not divide 3 ranks"),
        (("trace", "model.py:gone", "--world", "2", "--tensor-parallel", "2"), 2, "there is no plan for tensor"),
        (("show", "model.py"), 1, "no run file"),
        (("verify", "run.zg@bucket"), 2, "all graphs of the file: leave out @bucket"),
    ],
)
def test_what_is_mistyped_or_does_not_fit(args, code, said, zgraph_command):
    got, _, error = zgraph_command(*args)
    assert got == code, error
    assert said in " ".join(error.replace("│", " ").split())
    assert "Traceback" not in error


@pytest.mark.parametrize(("old", "new"), [("report", "env"), ("trace-export", "export")])
def test_old_names_are_still_understood_and_not_listed(old, new, zgraph_command):
    assert zgraph_command(old, "--help")[0] == 0
    first, rest = zgraph_command(old, "--help")[1].strip().split("\n", 1)
    assert f"zgraph {old}" in first
    assert rest == zgraph_command(new, "--help")[1].strip().split("\n", 1)[1]
    listed = re.findall(r"^│ ([a-z-]+) ", zgraph_command("--help")[1], re.M)
    assert new in listed
    assert old not in listed


def test_a_file_imports_what_lies_beside_it(tmp_path):
    (tmp_path / "beside_it.py").write_text("from torch import nn\n\nlayer = nn.Linear(2, 2)\n")
    (tmp_path / "mine.py").write_text(
        "from beside_it import layer\n\n\ndef make():\n    return layer, {'input': layer.weight}\n"
    )
    assert subject(f"{tmp_path}/mine.py:make").model.in_features == 2


def test_a_configuration_without_a_loss_is_captured(tmp_path):
    """GPT-2's says none, and transformers warns of it in the forward."""
    hf.GPT2Config(
        n_layer=1, n_embd=16, n_head=2, vocab_size=64, bos_token_id=1, eos_token_id=1, architectures=["GPT2LMHeadModel"]
    ).save_pretrained(tmp_path)
    found = subject(str(tmp_path), 1, 8)
    assert zgraph.trace(found.model, **found.inputs).param_names


def test_what_programs_read(zgraph_command):
    """JSON of every command, and runs by standard input and output."""
    _, out, _ = zgraph_command("passes", "--json")
    assert {row["name"] for row in json.loads(out)["passes"]} >= {"partition", "schedule"}
    assert json.loads(out)["recipes"]["3"] == RECIPES[3]
    data = Path("run.zg").read_bytes()
    _, out, _ = zgraph_command("opt", "-", "--json", stdin=data)
    steps = json.loads(out)
    assert [s["graph"] for s in steps][:2] == ["captured", "canonicalize"]
    assert sum(s["changed"].get("release", 0) for s in steps) > 0
    _, out, _ = zgraph_command(
        "show", "run.zg", "--op", "all_gather_start", "--phase", "fwd", "--lane", "comm", "--json"
    )
    nodes = json.loads(out)
    assert nodes
    assert {(n["op"], n["phase"], n["lane"]) for n in nodes} == {("all_gather_start", "fwd", "comm")}
    _, out, _ = zgraph_command("explain", "run.zg", nodes[0]["name"], "--json")
    found = json.loads(out)
    assert (found["events"][0]["did"], found["events"][0]["graph"]) == ("made", "all-gather")
    assert any("comm lane" in text for text in found["timing"])
    assert "model.py" in found["source"]
    _, out, _ = zgraph_command("simulate", "run.zg", "--json")
    assert json.loads(out)["step_us"] >= json.loads(out)["lower_bound_us"] > 0
    slow = ("--straggler", "3", "--fail-every", "3h", "--checkpoint", "60s", "--restart", "10m")
    _, out, _ = zgraph_command("simulate", "run.zg", *slow, "--json")
    found = json.loads(out)
    assert found["step_us"] - found["even_step_us"] >= 1.9 * found["busy_us"]["compute"] / 3 - found["exposed_us"]
    assert sum(v for k, v in found["goodput"].items() if k != "interval_s") == pytest.approx(1)
    _, out, _ = zgraph_command("simulate", "run.zg", *slow, "--checkpoint-every", "20m")
    assert "goodput 8" in out
    assert "after 20.0 minutes" in out
    assert "makes the step" in out
    code, _, error = zgraph_command("simulate", "run.zg", "--fail-every", "often")
    assert code == 2
    assert "is no duration" in error


def test_looking_at_a_run_takes_no_torch(zgraph_command):
    """Starting torch takes longer than all that these commands do."""
    looks = ("show run.zg", "diff run.zg@keep @bucket", "explain run.zg addmm_1", "simulate run.zg", "passes")
    script = f"""
import sys
sys.modules["torch"] = None
from zgraph.cli.main import main
for command in {looks}:
    sys.argv[1:] = command.split()
    try:
        main()
    except SystemExit as ended:
        print(command, ended.code, file=sys.stderr)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.stderr.splitlines() == [f"{command} 0" for command in looks]


def test_differences(zgraph_command):
    _, out, _ = zgraph_command("diff", "run.zg@reduce-scatter", "@release", "--json")
    found = json.loads(out)
    assert set(found["stat"]["added"]) == {"release"}
    assert not found["removed"]
    _, out, _ = zgraph_command("diff", "run.zg@final", "@final")
    assert [line.split()[0] for line in out.splitlines()] == ["0"] * 4
    _, out, _ = zgraph_command("diff", "run.zg@captured", "run.zg@partition")
    assert "+ fwd" in out
    assert "~ fwd" in out


def test_passes_as_the_user_chooses(zgraph_command):
    """Parts that are left out are not there; what is written can be read; the text that is printed parses."""
    code, out, _ = zgraph_command(
        "opt", "run.zg", "--disable-pass", "bucket", "--stop-after", "all-gather", "-o", "new.zg"
    )
    assert code == 0
    run = load_run(Path("new.zg"))
    assert run.names[-1] == "all-gather"
    assert "bucket" not in run.names
    _, out, _ = zgraph_command("opt", "run.zg", "--print-ir-after", "partition", "--verify-each")
    assert print_graph(parse_graph(out.partition("\n")[2])) == print_graph(load_run(Path("run.zg")).graph("partition"))
    _, changed, _ = zgraph_command("opt", "run.zg", "--print-ir-after-change")
    _, every, _ = zgraph_command("opt", "run.zg", "--print-ir-after-all")
    assert 0 < changed.count("# after") < every.count("# after") == len(load_run(Path("run.zg")).names) - 1


def test_a_wrong_graph_is_found(zgraph_command, tmp_path):
    run = load_run(Path("run.zg"))
    member = run.manifest.snapshots[run.position("schedule")].member
    lines = run.texts[member].splitlines()
    at = next(i for i, line in enumerate(lines) if "= aten.relu" in line)
    run.texts[member] = "\n".join([*lines[:at], *lines[at + 1 :]]) + "\n"
    run.save(tmp_path / "wrong.zg")
    code, _, error = zgraph_command("verify", str(tmp_path / "wrong.zg"))
    assert code == 1
    assert "the graph after" in error
    assert issubclass(VerifyError, zgraph.errors.ZgraphError)
