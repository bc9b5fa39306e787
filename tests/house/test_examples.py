"""Every example runs as its first lines say."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.house.rooms import ROOT
from zgraph.certify.certificate import certify
from zgraph.runfile.format import load_run


def run_example(name: str, folder: Path, num_ranks: int = 2) -> str:
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)] if num_ranks > 1 else []
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, str(ROOT / "examples" / name)]
    found = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


def test_a_pass_of_ones_own_trains_and_is_in_the_report(tmp_path):
    said = run_example("own_pass.py", tmp_path)
    first, last = (float(n) for n in re.findall(r"step \d+: loss ([\d.]+)", said))
    assert last < first
    assert re.search(r"deduplicate +│ -1 aten\.tanh", said)
    run = load_run(tmp_path / "own_pass.zg")
    steps = [(name.partition("#")[0], run.graph(name)) for name in run.names]
    assert "deduplicate" in [name for name, _ in steps]
    assert "equality" in {c.rule for c in certify(steps, run.context).checked}
