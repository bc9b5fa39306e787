"""`zgraph launch --hostfile` between two hosts, each a network namespace with an sshd of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.errors import HostsUnavailable
from benchmarks.hosts import INTERFACE, SUBNET, Host, emulated
from tests.deep import deep
from zgraph.cli.ending import END_S

SSHD = "/usr/sbin/sshd"
SCRIPT = """
import os, sys, time
import torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([dist.get_rank() + 1.0])
dist.all_reduce(total)
here = f"rank {dist.get_rank()} of {dist.get_world_size()} has {total.item()} in {os.readlink('/proc/self/ns/net')}"
print(here, sys.argv[1:], flush=True)
if "stay" in sys.argv:
    time.sleep(120)
dist.barrier()
if "fail" in sys.argv and dist.get_rank() == 1:
    sys.exit(7)
dist.destroy_process_group()
"""


class Hosts(NamedTuple):
    """Two hosts with an sshd, and where their files are."""

    each: list[Host]
    folder: Path

    def launch(self, *arguments: str) -> subprocess.Popen[str]:
        """The command, on the first host, in a session of its own."""
        words = [sys.executable, "-m", "zgraph", "launch", "--hostfile", str(self.folder / "hosts"), *arguments]
        variables = {
            **os.environ,
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "OMP_NUM_THREADS": "1",
            "ZGRAPH_NOTED": 'it\'s "here" $HOME',
        }
        return subprocess.Popen(
            [*self.each[0].prefix, *words],
            cwd=self.folder,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    """Hosts that take a key, and nothing else; and an ssh that knows them."""
    for tool in (SSHD, "ssh", "ssh-keygen"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}: make sshd")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    (tmp_path / "sshd_config").write_text(
        f"HostKey {tmp_path}/host\nAuthorizedKeysFile {tmp_path}/user.pub\nPidFile none\nUsePAM no\nStrictModes no\n"
        "PermitRootLogin prohibit-password\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
    )
    names = [f"{SUBNET}.{number}" for number in (1, 2)]
    key = " ".join((tmp_path / "host.pub").read_text().split()[:2])
    (tmp_path / "known").write_text("".join(f"{name} {key}\n" for name in names))
    (tmp_path / "ssh_config").write_text(
        f"Host *\n  IdentityFile {tmp_path}/user\n  UserKnownHostsFile {tmp_path}/known\n  StrictHostKeyChecking yes\n"
    )
    (tmp_path / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {tmp_path}/ssh_config "$@"\n')
    (tmp_path / "ssh").chmod(0o755)
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "hosts").write_text("".join(f"{name} slots=1\n" for name in names))
    servers = []
    try:
        with emulated(2, "1gbit") as each:
            try:
                for host in each:
                    command = [*host.prefix, SSHD, "-D", "-e", "-f", str(tmp_path / "sshd_config")]
                    servers.append(subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True))
                reach = [*each[0].prefix, str(tmp_path / "ssh"), "-o", "BatchMode=yes", names[1], "true"]
                until = time.monotonic() + 20
                while subprocess.run(reach, check=False, capture_output=True).returncode:
                    assert time.monotonic() < until, "sshd does not answer"
                    time.sleep(0.2)
                yield Hosts(each, tmp_path)
            finally:
                for server in servers:
                    os.killpg(server.pid, signal.SIGKILL)
                    server.wait()
    except HostsUnavailable as error:
        pytest.skip(str(error))


def network_of(host: Host) -> str:
    found = subprocess.run([*host.prefix, "readlink", "/proc/self/ns/net"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


@pytest.mark.parametrize("fails", [deep(False), deep(True)])
def test_ranks_on_two_hosts_meet(hosts: Hosts, fails: bool) -> None:
    running = hosts.launch("train.py", "it's", "fail" if fails else "well")
    said, _ = running.communicate(timeout=120)
    for rank, host in enumerate(hosts.each):
        assert f'{SUBNET}.{rank + 1}: rank {rank} of 2 has 3.0 in {network_of(host)} ["it\'s", ' in said, said
    assert running.returncode == (7 if fails else 0), said
    assert ("the others were ended" in said) == fails
    nothing_is_left(hosts)


def nothing_is_left(hosts: Hosts) -> None:
    """See that all that runs in the folder has ended, launchers too, and kill it otherwise."""

    def left() -> list[int]:
        found = [
            path for path in Path("/proc").glob("[0-9]*") if is_in(path, hosts.folder) and path.name != str(os.getpid())
        ]
        return [int(path.name) for path in found]

    until = time.monotonic() + END_S + 20
    while left() and time.monotonic() < until:
        time.sleep(0.2)
    found = left()
    for number in found:
        os.kill(number, signal.SIGKILL)
    assert not found


def is_in(process: Path, folder: Path) -> bool:
    try:
        return (process / "cwd").resolve() == folder
    except OSError:
        return False


@pytest.mark.parametrize("number", [deep(signal.SIGTERM), deep(signal.SIGINT)])
def test_what_runs_on_hosts_ends_with_the_launcher(hosts: Hosts, number: signal.Signals) -> None:
    running = hosts.launch("train.py", "stay")
    assert running.stdout is not None
    seen: list[str] = []
    while sum("has 3.0" in line for line in seen) < 2:
        line = running.stdout.readline()
        assert line, seen
        seen.append(line)
    assert len(ranks(hosts)) == 2
    os.killpg(running.pid, number)
    running.communicate(timeout=60)
    assert running.returncode != 0
    nothing_is_left(hosts)


def ranks(hosts: Hosts, host: Host | None = None) -> list[int]:
    """The processes of ranks, on one host or on any."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            variables = (path / "environ").read_bytes().split(b"\0")
            is_ours = (path / "cwd").resolve() == hosts.folder and any(one.startswith(b"RANK=") for one in variables)
            is_there = host is None or os.readlink(path / "ns/net") == network_of(host)
        except OSError:
            continue
        if is_ours and is_there:
            found.append(int(path.name))
    return found


ELASTIC = """
import time, torch, zgraph
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run = zgraph.elastic(model, optimizer)
for step in run.steps(1 << 30):
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    time.sleep(0.05)
    if run.has_taken and step % 10 == 0:
        print("step", step, "with", run.replicas, flush=True)
"""


@pytest.mark.parametrize("elastic", [deep("1:2")])
def test_a_replica_on_another_host_is_started_again(hosts: Hosts, elastic: str) -> None:
    (hosts.folder / "train.py").write_text(ELASTIC)
    running = hosts.launch("--elastic", elastic, "--master-addr", f"{SUBNET}.1", "train.py")
    assert running.stdout is not None
    seen: list[str] = []

    def until(word: str) -> None:
        while not seen or word not in seen[-1]:
            line = running.stdout.readline()  # type: ignore[union-attr]
            assert line, seen
            seen.append(line)

    until("with (0, 1)")
    for victim in ranks(hosts, hosts.each[1]):
        os.kill(victim, signal.SIGKILL)
    until("replica 1 is lost")
    until("with (0,)")
    until("with (0, 1)")
    os.killpg(running.pid, signal.SIGTERM)
    running.communicate(timeout=60)
    nothing_is_left(hosts)


@pytest.mark.parametrize("name", [deep(f"{SUBNET}.2")])
def test_a_host_that_refuses_the_key_is_named(hosts: Hosts, name: str) -> None:
    (hosts.folder / "user.pub").write_text("")
    running = hosts.launch("train.py")
    said, _ = running.communicate(timeout=120)
    assert running.returncode == 255
    assert "ssh may not reach it without a password: try `ssh -o BatchMode=yes" in said
