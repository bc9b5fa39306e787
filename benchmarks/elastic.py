"""Faults of replicas of an elastic job on emulated hosts, one after another, while the others train on.

Two replicas of two ranks, or as many as are asked for, train at stage 3, each replica on a host of its own, started by
`zgraph launch --elastic`'s launcher on another. Every replica that lives must take every step, once; nothing may stand
still for long; who lives on may capture nothing; the shards and the optimizer's states of all replicas must be equal to
the last bit after each step; and so must the losses be to those of a run that took no other micro-batches.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.elastic_rank import NAP_S
from benchmarks.hosts import INTERFACE, SUBNET, Host, emulated
from zgraph.cli.elastic_launching import Launcher, ranks_here

FAULTS = ("kill", "stop", "cut", "slow", "disk", "host")
CUT_S, SLOW_S, SLOW = 12.0, 4.0, "100kbit"
RATE = "1gbit"
BACK_S = 150.0
"""How long a replica may take to be there again."""
HANG_S = 30.0
NEWNET = 0x40000000
"""Of setns: a network namespace."""
VARIABLES = {"ZGRAPH_LOGS": "none", "OMP_NUM_THREADS": "1", "ZGRAPH_TIMEOUT": "25", "ZGRAPH_ELASTIC_GONE": "3"}


class Faulty(AssertionError):
    """Training did not go on as it must."""


@dataclass
class Outcome:
    """Observations over all faults.

    Args:
        faults: how many of each kind.
        num_steps: that were taken, each compared on all ranks.
        num_alone: of these, those that one replica took without the others.
        stalls_s: the longest time between two steps of those that lived on, of each fault.
        back_s: the time until all replicas took a step together again, of each fault.
        num_lost_steps: steps that a replica that lived, and was not left out, has not taken.
        num_recaptured: graphs that were captured after a rank's first step.
    """

    faults: dict[str, int] = field(default_factory=dict)
    num_steps: int = 0
    num_alone: int = 0
    num_restarts: int = 0
    stalls_s: dict[str, list[float]] = field(default_factory=dict)
    back_s: dict[str, list[float]] = field(default_factory=dict)
    num_lost_steps: int = 0
    num_recaptured: int = 0


class Campaign:
    """An elastic job, and faults in it.

    Args:
        hosts: of the replicas.
        folder: where ranks write what they do.
        disks: of each host.
        num_ranks: of each replica.
        seed: of the faults.
        address: under which the hosts reach the launcher.
    """

    def __init__(
        self, hosts: Sequence[Host], folder: Path, disks: Sequence[Path], num_ranks: int, seed: int, address: str
    ) -> None:
        self.num_ranks = num_ranks
        self.hosts, self.folder, self.disks, self.random = hosts, folder, disks, random.Random(seed)
        self.outcome = Outcome()
        command = ["bash", "-c", f'exec {sys.executable} -m benchmarks.elastic_rank {folder} "$DISK"']
        self.launcher = Launcher(
            ranks_here(command, num_ranks, prefix=lambda at: [*hosts[at].prefix, "env", f"DISK={disks[at]}"]),
            address,
            1,
            len(hosts),
            1 << 30,
            "",
        )
        self.code: list[int] = []
        self.thread = threading.Thread(target=lambda: self.code.append(self.launcher.run()))

    def rows(self) -> dict[Path, list[list[Any]]]:
        """The lines of each rank's life; one that is being written is left out."""
        found = {}
        for path in self.folder.glob("[0-9]*.jsonl"):
            lines = path.read_text().split("\n")[:-1]
            found[path] = [json.loads(line) for line in lines]
        return found

    def wait_together(self, behind: float) -> float:
        """Wait until all ranks of all replicas have taken a step together after a moment; that step's time.

        Raises:
            Faulty: they have not.
        """
        until = time.monotonic() + BACK_S
        all_ranks = {f"{at}-{rank}" for at in range(len(self.hosts)) for rank in range(self.num_ranks)}
        while time.monotonic() < until:
            if self.code:
                raise Faulty(f"the job has ended with exit code {self.code}")
            here: dict[str, float] = {}
            for path, rows in self.rows().items():
                late = [row[4] for row in rows[-20:] if row[4] > behind and len(row[1]) == len(self.hosts)]
                if late:
                    name = path.name.rpartition("-")[0]
                    here[name] = min(late[0], here.get(name, late[0]))
            if here.keys() >= all_ranks:
                return max(here.values())
            time.sleep(0.3)
        raise Faulty(f"the replicas were not together again within {BACK_S:g} s")

    def fault(self, kind: str) -> None:
        """One fault, and wait for all replicas to train together again."""
        at, rank = self.random.randrange(len(self.hosts)), self.random.randrange(self.num_ranks)
        time.sleep(self.random.uniform(0.5, 1.5))
        for gang in self.launcher.gangs:
            gang.num_deaths = 0  # faults come faster here than a launcher would put up with
        pids = [process.pid for process in self.launcher.gangs[at].processes]
        began = time.monotonic()
        if kind == "kill":
            os.kill(pids[rank], signal.SIGKILL)
        elif kind == "stop":
            os.kill(pids[rank], signal.SIGSTOP)
        elif kind == "host":
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        elif kind == "cut":
            self._ip(at, "link", "set", INTERFACE, "down")
            time.sleep(CUT_S)
            self._ip(at, "link", "set", INTERFACE, "up")
        elif kind == "slow":
            self._rate(at, SLOW)
            time.sleep(SLOW_S)
            self._rate(at, RATE)
        elif kind == "disk":
            filler, deaths = self.disks[at] / "filler", self.launcher.num_restarts
            with filler.open("wb") as file:
                subprocess.run(["dd", "if=/dev/zero", "bs=4k"], stdout=file, stderr=subprocess.DEVNULL, check=False)
            until = time.monotonic() + HANG_S
            while self.launcher.num_restarts == deaths and time.monotonic() < until:
                time.sleep(0.1)
            filler.unlink()
        over = time.monotonic()
        together = self.wait_together(over)
        self._count(kind, began, together, pids)

    def _count(self, kind: str, began: float, together: float, pids: Sequence[int]) -> None:
        """Take down how long those that lived on stood still."""
        stall = 0.0
        for path, rows in self.rows().items():
            times = [row[4] for row in rows]
            if int(path.stem.rpartition("-")[2]) in pids or not times or times[0] > began:
                continue
            if times[-1] < together - 2:
                continue
            near = [t for t in times if began - 2 * NAP_S - 1 < t <= together + 1]
            stall = max([stall, *(b - a for a, b in itertools.pairwise(near))])
        self.outcome.faults[kind] = self.outcome.faults.get(kind, 0) + 1
        self.outcome.stalls_s.setdefault(kind, []).append(round(stall, 2))
        self.outcome.back_s.setdefault(kind, []).append(round(together - began, 2))
        print(f"{kind}: stood still for {stall:.1f} s, together after {together - began:.1f} s", flush=True)
        if stall > HANG_S:
            raise Faulty(f"after {kind} the others stood still for {stall:.1f} s")

    def _ip(self, at: int, *words: str) -> None:
        subprocess.run(["ip", "-n", self.hosts[at].prefix[-1], *words], check=True)

    def _rate(self, at: int, rate: str) -> None:
        words = ["qdisc", "change", "dev", INTERFACE, "root", "tbf", "rate", rate, "burst", "512k", "limit", "64m"]
        subprocess.run(["tc", "-n", self.hosts[at].prefix[-1], *words], check=True)

    def finish(self) -> None:
        """End the job, and compare everything.

        Raises:
            Faulty: something differs.
        """
        last = max(row[0] for rows in self.rows().values() for row in rows[-1:])
        (self.folder / "stop").write_text(str(last + 5))
        self.thread.join(60)
        if self.code != [0]:
            raise Faulty(f"the job has ended with exit code {self.code[0]}" if self.code else "the job does not end")
        members, by_step = self._compare()
        path = self.folder / "members.json"
        path.write_text(json.dumps(members))
        start = ranks_here([sys.executable, "-m", "benchmarks.elastic_rank", str(self.folder)], self.num_ranks)
        for process in start(0, {}):
            out, _ = process.communicate(timeout=600)
            if process.returncode:
                raise Faulty(f"the reference ended: {out.decode()[-2000:]}")
        for rank in range(self.num_ranks):
            lines = (self.folder / f"reference-{rank}.jsonl").read_text().splitlines()
            for step, line in enumerate(lines):
                losses, held = json.loads(line)
                for replica, loss, its in by_step[step, rank]:
                    if (loss, its) != (losses[str(replica)], held):
                        raise Faulty(f"step {step}: replica {replica} has {loss}, {its}, and the reference {line}")
        self.outcome.num_steps = len(members)
        self.outcome.num_alone = sum(len(one) == 1 for one in members)
        self.outcome.num_restarts = self.launcher.num_restarts

    def _compare(self) -> tuple[list[list[int]], dict[tuple[int, int], list[tuple[int, float, str]]]]:
        """The replicas of each step, and what each of their ranks had then, which must be equal."""
        members: dict[int, list[int]] = {}
        found: dict[tuple[int, int], list[tuple[int, float, str]]] = {}
        gaps: list[tuple[int, int]] = []
        for path, rows in self.rows().items():
            replica, rank, _ = map(int, path.stem.split("-"))
            for before, row in zip([None, *rows], rows, strict=False):
                if members.setdefault(row[0], row[1]) != row[1]:
                    raise Faulty(f"step {row[0]} was taken by {row[1]} and by {members[row[0]]}")
                found.setdefault((row[0], rank), []).append((replica, row[2], row[3]))
                if before is not None:
                    gaps.extend((replica, step) for step in range(before[0] + 1, row[0]))
                self.outcome.num_recaptured += before is not None and before[5] != row[5]
        self.outcome.num_lost_steps = sum(replica in members.get(step, [replica]) for replica, step in gaps)
        for (step, _), each in found.items():
            if len({held for _, _, held in each}) > 1:
                raise Faulty(f"after step {step} replicas differ: {each}")
            if len({replica for replica, _, _ in each}) < len(each):
                raise Faulty(f"a replica took step {step} twice: {each}")
        if sorted(members) != [*range(len(members))]:
            raise Faulty("a step is missing")
        return [members[step] for step in range(len(members))], found


@contextmanager
def placed(name: str) -> Iterator[None]:
    """Be on an emulated host, with all threads begun from now on."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/self/ns/net") as own, open(f"/run/netns/{name}") as other:
        if libc.setns(other.fileno(), NEWNET):
            raise OSError(ctypes.get_errno(), f"setns to {name}")
        try:
            yield
        finally:
            libc.setns(own.fileno(), NEWNET)


@contextmanager
def disks(folder: Path, count: int) -> Iterator[list[Path]]:
    """Small disks in memory."""
    with ExitStack() as stack:
        found = []
        for at in range(count):
            path = folder / f"disk{at}"
            path.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)], check=True)
            stack.callback(subprocess.run, ["umount", "-l", str(path)], check=False)
            found.append(path)
        yield found


def run(
    num_faults: int, seed: int, seconds: float = float("inf"), num_replicas: int = 2, num_ranks: int = 2
) -> Outcome:
    """So many faults of replicas of so many ranks, or as many as so many seconds allow, and compare.

    Raises:
        Faulty: training did not go on as it must.
        HostsUnavailable: this machine cannot emulate hosts.
    """
    os.environ |= {**VARIABLES, "GLOO_SOCKET_IFNAME": INTERFACE}
    folder = Path(tempfile.mkdtemp())
    until = time.monotonic() + seconds
    try:
        with (
            emulated(num_replicas + 1, RATE) as hosts,
            disks(folder, num_replicas) as each,
            placed(hosts[-1].prefix[-1]),
        ):
            campaign = Campaign(hosts[:-1], folder, each, num_ranks, seed, f"{SUBNET}.{len(hosts)}")
            campaign.thread.start()
            try:
                campaign.wait_together(0.0)
                order = [kind for _ in range(-(-num_faults // len(FAULTS))) for kind in FAULTS][:num_faults]
                campaign.random.shuffle(order)
                for number, kind in enumerate(order, 1):
                    campaign.fault(kind)
                    print(f"{number} faults", flush=True)
                    if time.monotonic() > until:
                        break
                campaign.finish()
            finally:
                for gang in campaign.launcher.gangs:
                    gang.has_ended = True
                campaign.thread.join(60)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return campaign.outcome


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2, help="of each replica")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no other fault is begun")
    parser.add_argument("--json", type=Path, help="where to write what was found")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    outcome = run(options.faults, options.seed, options.seconds, options.replicas, options.ranks)
    seconds = time.monotonic() - began
    slowest = max(stall for each in outcome.stalls_s.values() for stall in each)
    print(f"{sum(outcome.faults.values())} faults, {outcome.num_steps} steps as without them, {seconds:.0f} s")
    print(f"{outcome.num_lost_steps} steps lost, {outcome.num_recaptured} captured again, stood still {slowest:.1f} s")
    shape = {"num_replicas": options.replicas, "num_ranks": options.ranks}
    results.write(options.json, seed=options.seed, **shape, slowest_stall_s=slowest, seconds=seconds, **asdict(outcome))


if __name__ == "__main__":
    main()
