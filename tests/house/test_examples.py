"""Every example runs as its first lines say. Those that run on two ranks do so in the same processes, in turn."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.deep import DEEP, deep
from tests.house.rooms import ROOT
from zgraph.certify.certificate import certify
from zgraph.cli.main import main
from zgraph.engine.config.read import read_config
from zgraph.runfile.format import load_run

EXAMPLES = ROOT / "examples"
IN_TURN = ROOT / "tests" / "house" / "in_turn.py"

ON_TWO_RANKS = ("own_pass.py", "from_fsdp2.py", "from_deepspeed.py")
LATER = ("lora.py", "vision.py", "hf_trainer.py")
"""Examples that `make test-deep` runs beside them."""

RUN_ELSEWHERE = {
    "train.py": "by test_docs.py: it is the README's",
    "tiny.py": "by test_docs.py: a model for the command",
    "wrong_pass.py": "by test_docs.py: in docs/debug-a-pass.md",
    "plan_70b.py": "below",
    "demo.py": "by `make demo`",
    "finetune_smollm2.py": "needs weights; benchmarks/hf_trainer.py trains the same model",
}
HELPERS = {"__init__.py", "launch.py", "progress.py", "smollm2.py", "tables.py", "text.py", "training.py"}


def run(command: list[str], folder: Path) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="module")
def said(folder) -> dict[str, str]:
    """Output of the first rank of each example."""
    names = ON_TWO_RANKS + (LATER if DEEP else ())
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    text = run([sys.executable, *launch, str(IN_TURN), *(str(EXAMPLES / name) for name in names)], folder)
    parts = re.split(r"^--- (\S+)\n", text, flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def losses(text: str) -> list[float]:
    return [float(n) for n in re.findall(r"step +\d+: loss ([\d.]+)", text)]


def test_every_example_is_run_somewhere():
    there = {path.name for path in EXAMPLES.glob("*.py")} - HELPERS
    assert there == {*ON_TWO_RANKS, *LATER, *RUN_ELSEWHERE}


def test_a_pass_of_ones_own_trains_and_is_in_the_report(said, folder):
    first, last = losses(said["own_pass.py"])
    assert last < first
    assert re.search(r"deduplicate +│ -1 aten\.tanh", said["own_pass.py"])
    run = load_run(folder / "own_pass.zg")
    steps = [(name.partition("#")[0], run.graph(name)) for name in run.names]
    assert "deduplicate" in [name for name, _ in steps]
    assert "equality" in {c.rule for c in certify(steps, run.context).checked}


def test_fsdp2_and_zgraph_have_the_same_losses(said):
    rows = re.findall(r"^ +(\d) +([\d.]+) +([\d.]+)$", said["from_fsdp2.py"], re.M)
    assert [step for step, *_ in rows] == list("12345")
    for _, one, other in rows:
        assert float(one) == pytest.approx(float(other), rel=1e-5)


def test_the_deepspeed_script_trains_and_resumes(said):
    found = losses(said["from_deepspeed.py"])
    assert len(found) == 4
    assert found[-1] < found[0]
    assert "resumed after step 8" in said["from_deepspeed.py"]


@pytest.mark.parametrize("name", [deep("lora.py"), deep("vision.py")])
def test_the_loss_falls(said, name):
    found = losses(said[name])
    assert found[-1] < found[0]


@pytest.mark.parametrize("name", [deep("hf_trainer.py")])
def test_the_trainer_logs_a_loss_that_falls(said, name):
    found = [float(n) for n in re.findall(r"'loss': '?([\d.]+)", said[name])]
    assert len(found) == 4
    assert found[-1] < found[0]


@pytest.mark.parametrize("path", sorted((EXAMPLES / "configs").glob("*.json")), ids=lambda path: path.stem)
def test_configurations_are_read(path):
    config = read_config(path, world_size=2)
    assert config.keys.zero_optimization.stage == (2 if path.stem == "zero2" else 3)
    assert not config.notes  # no key that has no effect


@pytest.mark.parametrize("name", [deep("zero2"), deep("offload")])
def test_other_configurations_train(tmp_path, name):
    script, config = str(EXAMPLES / "from_deepspeed.py"), str(EXAMPLES / "configs" / f"{name}.json")
    found = losses(run([sys.executable, script, "--config", config], tmp_path))
    assert found[-1] < found[0]


@pytest.mark.parametrize("layers", [deep(80)])
def test_70_billion_parameters_are_planned(tmp_path, layers):
    said = run([sys.executable, str(EXAMPLES / "plan_70b.py"), "--layers", str(layers)], tmp_path)
    assert "70.55 billion parameters on 64 ranks of h100" in said
    assert "the fastest that fits" in said


def test_the_notebook_runs(tmp_path, monkeypatch, capfd):
    """Each cell in turn; a line that begins with ! is the zgraph command, and a last line that is a name is shown."""
    monkeypatch.chdir(tmp_path)
    torch.compiler.reset()
    names: dict[str, object] = {}
    for cell in json.loads((EXAMPLES / "report.ipynb").read_text())["cells"]:
        assert not cell.get("outputs")
        if cell["cell_type"] != "code":
            continue
        lines = "".join(cell["source"]).splitlines()
        exec("\n".join(line for line in lines if not line.startswith("!")), names)
        for line in (line for line in lines if line.startswith("!")):
            monkeypatch.setattr(sys, "argv", line[1:].split())
            with pytest.raises(SystemExit) as ended:
                main()
            assert not ended.value.code
        if lines[-1].isidentifier():
            assert "<iframe" in names[lines[-1]]._repr_html_()
    text = capfd.readouterr().out
    assert "peak above rest" in text
    assert re.search(r"predicted step: \d+ us", text)
    simulated = r"^predicted step [\d.]+ .s( \(80 %: [\d.]+ to [\d.]+\))?, lower bound"
    assert re.search(simulated, text, re.M)
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_cluster_files_are_well_formed():
    folder = EXAMPLES / "cluster"
    for script in (folder / "torchrun.sh", folder / "slurm.sbatch"):
        subprocess.run(["bash", "-n", str(script)], check=True)
    service, job = yaml.safe_load_all((folder / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    assert (service["kind"], job["kind"], pod["subdomain"]) == ("Service", "Job", service["metadata"]["name"])
    assert f"--nnodes {job['spec']['completions']} " in pod["containers"][0]["command"][2]
    host = pod["containers"][0]["command"][2].split("--master-addr ")[1].split()[0]
    assert host == f"{job['metadata']['name']}-0.{service['metadata']['name']}"


def test_torchrun_takes_the_options_of_the_cluster_files():
    from torch.distributed.run import get_args_parser

    known = set(get_args_parser()._option_string_actions)
    for path in (EXAMPLES / "cluster").iterdir():
        text = path.read_text()
        used = re.findall(r"(?<!-)--[a-z-]+", text[text.index("torchrun ") :])
        assert used
        assert set(used) <= known
