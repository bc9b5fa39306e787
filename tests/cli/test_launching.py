"""Ranks on other hosts: by ssh, of which there is one that stays here, and as jobs of clusters."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.deep import deep
from zgraph.cli import ending
from zgraph.cli.clusters import Job, job_set, pytorch_job, sbatch
from zgraph.cli.environment_report import cores
from zgraph.cli.launching import Host, _options, command_on, hosts_of
from zgraph.errors import UsageError

SSH = """#!/usr/bin/env bash
while [ "$1" != "--" ]; do shift; done
exec bash -c "$3"
"""


@pytest.fixture
def ssh(tmp_path, monkeypatch):
    """An ssh whose hosts are all this one."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ssh").write_text(SSH)
    (folder / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setenv("ZGRAPH_NOTED", "a b'c")
    monkeypatch.setenv("HF_TOKEN", "hunter2")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.parametrize(("more", "code"), [deep([], 0), deep(["--fail"], 7)])
def test_hosts_are_reached_by_ssh(ssh, zgraph_command, tmp_path, monkeypatch, more, code):
    (tmp_path / "hosts").write_text("localhost slots=1\n# the second\n127.0.0.1 slots=1\n")
    arguments = ("--hostfile", str(tmp_path / "hosts"), "--master-port", str(free_port()), "train.py", "it's", *more)
    ended, out, error = zgraph_command("launch", *arguments)
    assert ended == code, error
    for number, host in enumerate(("localhost", "127.0.0.1")):
        assert f"{host}: rank {number} of 2, {cores()} threads, {[arguments[-2 if more else -1], *more]}" in out
    assert "hunter2" not in out
    assert ("the others were ended" in error) == bool(code)


@pytest.mark.parametrize("ends", [deep(True)])
def test_each_host_has_a_replica(ssh, zgraph_command, tmp_path, ends):
    (tmp_path / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    arguments = (
        "--hostfile",
        str(tmp_path / "hosts"),
        "--elastic",
        "1:1",
        "--master-addr",
        "127.0.0.1",
        "train.py",
        "x",
    )
    ended, out, error = zgraph_command("launch", *arguments)
    assert (ended == 0) == ends, error
    assert f"replica 0: rank 0 of 1, {cores()} threads, ['x']" in out


BLOCKED = """
import os, signal, sys, threading, time
from datetime import timedelta
from zgraph.bridge.private_runtime import tcp_store
from zgraph.cli.ending import ended_within

def ask(number, _):
    raise SystemExit(5)

signal.signal(signal.SIGHUP, ask)
store, _ = tcp_store("localhost", 0, timedelta(seconds=100), serves=True)
with ended_within(float(sys.argv[1])):
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGHUP)).start()
    if sys.argv[2] == "blocked":
        store.get("never")  # in C++, where no handler of Python runs
    time.sleep(60)
"""


@pytest.mark.parametrize(("where", "code"), [deep("blocked", 129), deep("free", 5)])
def test_a_launcher_that_waits_in_cpp_ends(where, code):
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", BLOCKED, "1.0", where], check=False, timeout=90, capture_output=True)
    assert ended.returncode == code, ended.stderr.decode()
    assert time.monotonic() - began < 60


LEFT = """
import os, signal, subprocess, time
from zgraph_ending import ended_within

signal.signal(signal.SIGTERM, lambda *_: None)
own = ["sh", "-c", "sleep 60 & echo $!; sleep 60"]
with ended_within(0.1):
    for apart in (True, False):
        child = subprocess.Popen(own, stdout=subprocess.PIPE, start_new_session=apart)
        print(child.pid, child.stdout.readline().decode().strip(), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


def test_a_launcher_that_is_ended_leaves_no_ranks(tmp_path):
    (tmp_path / "zgraph_ending.py").write_text(Path(ending.__file__).read_text())
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", LEFT], cwd=tmp_path, start_new_session=True, **pipes) as launcher:
        (leader, of_leader), (one, _) = (map(int, launcher.stdout.readline().split()) for _ in range(2))
        try:
            until = time.monotonic() + 10
            while any(map(runs, (leader, of_leader, one))) and time.monotonic() < until:
                time.sleep(0.02)
            assert not any(map(runs, (leader, of_leader, one)))
            assert launcher.wait(10) == 128 + signal.SIGTERM
        finally:
            os.killpg(launcher.pid, signal.SIGKILL)  # the child of the one in the launcher's own group
            if runs(leader) or runs(of_leader):
                os.killpg(leader, signal.SIGKILL)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_first_host_is_where_they_meet(monkeypatch):
    monkeypatch.setattr("os.environ", {"PATH": "/bin", "HF_TOKEN": "hunter2", "NCCL_DEBUG": "INFO", "SHELL": "sh"})
    hosts = [Host("user@gpu-1", 8), Host("gpu-2")]
    options = _options(["--hostfile", "hosts", "--master-port", "7", "train.py", "--x"])
    commands = [command_on(host, number, hosts, options) for number, host in enumerate(hosts)]
    place = "--master-addr gpu-1 --master-port 7 train.py --x"
    ends = [f"--node-rank 0 --nproc-per-node 8 {place}", f"--node-rank 1 {place}"]
    for command, end in zip(commands, ends, strict=True):
        assert command.endswith(f"-m zgraph launch --nnodes 2 {end}")
        assert "env NCCL_DEBUG=INFO PATH=/bin " in command


def test_a_hostfile_is_read(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("a slots=8\n\nuser@b  # half\nc slots=4\n")
    assert hosts_of(path) == [Host("a", 8), Host("user@b"), Host("c", 4)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no host"),
        ("a\na slots=2\n", "line 2: a is there twice"),
        ("a slots=many\n", "line 1"),
        ("a slots=²\n", "line 1"),
        ("-oProxyCommand=x\n", "line 1"),
        ("a b c\n", "line 1"),
        ("x" * (1 << 20) + "\n", "more than"),
        (b"\xff\xfe", "can't decode"),
        (None, "No such file"),
    ],
)
def test_a_hostfile_that_means_nothing_is_refused(tmp_path, text, said):
    path = tmp_path / "hosts"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=said):
        hosts_of(path)


JOB = Job(("train.py", "--name", "it's $HOME; x"), 4, 8, "llama", image="registry/llama:1")


def shown(shell: str) -> list[str]:
    """The words that a shell makes of a command's arguments."""
    script = f"torchrun() {{ printf '%s\\n' \"$@\"; }}\n{shell}"
    environment = {"RANK": "3", "MASTER_ADDR": "m", "MASTER_PORT": "1", "JOB_COMPLETION_INDEX": "3", "PATH": "/bin"}
    return subprocess.run(
        ["bash", "-c", script], env=environment, check=True, capture_output=True, text=True
    ).stdout.split("\n")


def test_slurm(tmp_path):
    text = sbatch(Job(JOB.command, 4, 8, "llama", time="1-12:00:00", partition="gpu", account="me"))
    options = [line.split(" ", 1)[1] for line in text.splitlines() if line.startswith("#SBATCH")]
    assert options == [
        "--job-name=llama",
        "--nodes=4",
        "--ntasks-per-node=1",
        "--gpus-per-node=8",
        "--exclusive",
        "--time=1-12:00:00",
        "--partition=gpu",
        "--account=me",
    ]
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    line = text.splitlines()[-1].removeprefix("srun --kill-on-bad-exit=1 ")
    assert shown(f"first_host=n1 SLURM_JOB_ID=7\n{line}") == [
        *("--nnodes", "4", "--nproc-per-node", "8", "--rdzv-backend", "c10d", "--rdzv-endpoint", "n1:29500"),
        *("--rdzv-id", "7", "train.py", "--name", "it's $HOME; x", ""),
    ]
    assert "gpus" not in sbatch(Job(("t.py",), 1, 1, gpus=False))


def pod_of(found, name):
    return found["spec"]["template"]["spec"] if name == "jobset" else found["template"]["spec"]


@pytest.mark.parametrize("name", ["jobset", "pytorchjob"])
def test_kubernetes(name):
    found = yaml.safe_load((job_set if name == "jobset" else pytorch_job)(JOB))
    if name == "jobset":
        assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
        (job,) = found["spec"]["replicatedJobs"]
        inner = job["template"]["spec"]
        assert (inner["parallelism"], inner["completions"], inner["completionMode"]) == (4, 4, "Indexed")
        pods, address = [inner["template"]["spec"]], "llama-hosts-0-0.llama"
        assert found["spec"]["network"]["subdomain"] == address.partition(".")[2]
    else:
        assert (found["apiVersion"], found["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
        replicas = found["spec"]["pytorchReplicaSpecs"]
        assert {kind: spec["replicas"] for kind, spec in replicas.items()} == {"Master": 1, "Worker": 3}
        pods, address = [spec["template"]["spec"] for spec in replicas.values()], "m"
    for pod in pods:
        (container,) = pod["containers"]
        assert container["image"] == "registry/llama:1"
        assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
        bash, option, shell = container["command"]
        assert (bash, option) == ("bash", "-c")
        words = shown(shell.removeprefix("exec "))
        assert words[:8] == ["--nnodes", "4", "--nproc-per-node", "8", "--node-rank", "3", "--master-addr", address]
        assert words[-5:] == [words[9], "train.py", "--name", "it's $HOME; x", ""]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "A b"}, "--job-name"),
        ({"num_hosts": 0}, "at least one host"),
        ({"time": "soon"}, "--time"),
        ({"partition": "a\n#SBATCH --x"}, "--partition"),
        ({"account": "$(x)"}, "--account"),
    ],
)
def test_names_that_mean_nothing_are_refused(options, said):
    with pytest.raises(UsageError, match=said):
        Job(**{"command": ("t.py",), "num_hosts": 1, "num_ranks": 1} | options)


def test_a_job_is_printed(zgraph_command):
    arguments = ("--nnodes", "2", "--nproc-per-node", "4", "--job-name", "gpt")
    code, out, _ = zgraph_command("launch", "--print", "pytorchjob", "--image", "i:1", *arguments, "train.py")
    assert code == 0
    assert yaml.safe_load(out)["metadata"] == {"name": "gpt"}
    code, out, _ = zgraph_command("launch", "--print", "slurm", "--cpus-only", "-m", *arguments[:-2], "train", "--x")
    assert code == 0
    assert "gpus" not in out
    assert out.splitlines()[-1].endswith("-m train --x")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--print", "jobset", "--nproc-per-node", "8", "train.py"), "give --image"),
        (("--print", "slurm", "--nnodes", "1:4", "train.py"), "number of hosts"),
        (("--print", "jobset", "--submit", "train.py"), "kubectl"),
        (("--submit", "--nproc-per-node", "8", "train.py"), "needs sbatch"),
        (("--print", "slurm", "--nnodes", "4", "train.py"), "--nproc-per-node 8"),
        (("--print", "slurm", "--hostfile", "hosts", "train.py"), "give one of them"),
        (("--print", "slurm", "--log-dir", "logs", "train.py"), "--log-dir is for"),
        (("--hostfile", "hosts", "--rdzv-backend", "etcd", "train.py"), "--rdzv-backend is for"),
        (("--hostfile", "hosts", "--nnodes", "2", "train.py"), "the number of hosts"),
        (("--time", "1:00:00", "train.py"), "--time is for a job"),
    ],
)
def test_jobs_that_cannot_be_are_refused(zgraph_command, monkeypatch, arguments, said):
    monkeypatch.setenv("PATH", "/nowhere")
    code, _, error = zgraph_command("launch", *arguments)
    assert code == 2
    assert said in error
