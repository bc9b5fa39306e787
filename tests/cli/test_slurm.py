"""Jobs that SLURM itself takes: `sbatch --test-only`, of a controller on this machine whose nodes are in no rack."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deep import deep
from zgraph.cli.clusters import Job, sbatch

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/none
CredType=cred/none
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/pid
SlurmctldLogFile={folder}/log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
GresTypes=gpu
ResumeProgram=/bin/true
SuspendProgram=/bin/true
SuspendTime=100000
NodeName=node[1-4] CPUs=64 Gres=gpu:8 State=CLOUD
PartitionName=gpu Nodes=ALL Default=YES State=UP
"""


@pytest.fixture
def controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A controller of four nodes of 8 GPUs, which is asked by what runs here."""
    missing = [name for name in ("slurmctld", "sbatch", "scontrol") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no {missing[0]}: make slurm")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "state").mkdir()
    path = tmp_path / "slurm.conf"
    path.write_text(CONFIGURATION.format(host=socket.gethostname().partition(".")[0], port=port, folder=tmp_path))
    (tmp_path / "gres.conf").write_text("NodeName=node[1-4] Name=gpu Count=8\n")
    monkeypatch.setenv("SLURM_CONF", str(path))
    with (tmp_path / "said").open("wb") as said:
        running = subprocess.Popen(["slurmctld", "-D", "-f", str(path)], stdout=said, stderr=said)
    try:
        until = time.monotonic() + 20
        while subprocess.run(["scontrol", "ping"], capture_output=True, check=False).returncode:
            assert running.poll() is None, (tmp_path / "said").read_text()[-2000:]
            assert time.monotonic() < until, "the controller does not answer"
            time.sleep(0.2)
        yield
    finally:
        running.kill()
        running.wait()


def asked(text: str) -> tuple[int, str]:
    ended = subprocess.run(["sbatch", "--test-only"], input=text, text=True, capture_output=True, check=False)
    return ended.returncode, ended.stderr


JOBS = [
    Job(("train.py", "--name", "it's $HOME; x"), 4, 8, "llama", time="1-12:00:00", partition="gpu"),
    Job(("t.py",), 1, 1, gpus=False),
    Job(("t.py",), 2, 3, rest=("-m",)),
]


@pytest.mark.parametrize("number", [deep(0), deep(1), deep(2)])
def test_slurm_takes_the_job(controller: None, number: int) -> None:
    job = JOBS[number]
    code, said = asked(sbatch(job))
    assert code == 0, said
    assert "to start at" in said
    assert said.count("node") >= 2
    code, said = asked(sbatch(job).replace("#SBATCH --nodes=", "#SBATCH --nodes=9"))
    assert code, "the controller looks at what is asked for"
    code, said = asked(sbatch(job).replace("#SBATCH --nodes=", "#SBATCH --knots="))
    assert code
    assert "unrecognized option" in said
