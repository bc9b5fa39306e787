"""`zgraph launch --elastic`: replicas that are started again when they die, around a store that outlives them."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from zgraph.bridge.private_runtime import PrefixStore, tcp_store
from zgraph.environment import environment
from zgraph.errors import UsageError
from zgraph.runtime.generations import Generation, latest_word
from zgraph.runtime.pulse import PREFIX, Member, beat_key, say_gone
from zgraph.runtime.questions import is_there, peek

LOOK_S = 0.1
WARNING = re.compile(r"\[W\d{4} |frame #|<omitting python frames>|Exception raised from ")
"""How warnings of torch's C++ and their stacks begin: they are no last words."""
LAST_S = 5.0
"""Words that were said longer before the end have nothing to do with it."""
GRACE_S = 10.0
"""How long ranks have to end by themselves, when all are ended."""
BACKOFF_S, MOST_BACKOFF_S = 0.5, 30.0
"""How long a replica that died waits before it is started again: twice as long each time, up to the most."""
SILENT_S = 20.0
"""After so long without a beat of one of its ranks a replica is killed, and started again: it may hang for good."""
HEALTHY_S = 60.0
"""How long a replica lives before earlier deaths are forgotten."""
MOST_RESTARTS = 10
"""Of a replica, one after another, where `--max-restarts` is not given."""
REAP_S = 5.0
"""How long to wait until what was killed is gone: it may hold a device's memory until then."""

Start = Callable[[int, dict[str, str]], list["subprocess.Popen[bytes]"]]
"""Starts the ranks of a replica, by its number and the variables that it needs beside the environment."""


@dataclass
class Gang:
    """The processes of a replica.

    Args:
        replica: its number.
        processes: of its life; none while it waits to be started.
        began, due: when it was started, and when it is to be.
        num_deaths: one after another.
        said: the last line of each of its processes, and when it came.
        has_ended: whether it is not to be started any more.
        life: number of its last life before it was started.
        looked: when its beats were read last.
        threads: which read what it says.
    """

    replica: int
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    began: float = 0.0
    due: float = 0.0
    num_deaths: int = 0
    said: dict[int, tuple[str, float]] = field(default_factory=dict)
    has_ended: bool = False
    life: int = 0
    looked: float = 0.0
    threads: list[threading.Thread] = field(default_factory=list)

    def failure(self) -> tuple[str, int] | None:
        """Who of it has failed, how, and with which exit code."""
        for rank, process in enumerate(self.processes):
            if code := code_of(process):
                how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                if len(self.processes) == 1:
                    return f"it {how}", code
                return f"rank {rank} of it {how}", code
        return None

    def is_over(self) -> bool:
        """Whether all of it has come to the end."""
        return bool(self.processes) and all(code_of(process) == 0 for process in self.processes)

    def end(self, number: int) -> None:
        """Send a signal to all of it, and to what it has started: also of a process that has ended."""
        for process in self.processes:
            if process.returncode is None:  # not waited for, so that the number is no other group's
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, number)

    def kill(self) -> None:
        """Kill all of it, and wait for its end."""
        self.end(signal.SIGKILL)
        until = time.monotonic() + REAP_S
        for process in self.processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(until - time.monotonic(), 0.0))


def code_of(process: subprocess.Popen[bytes]) -> int | None:
    """The exit code of a process that has ended; None if it runs. It is not waited for, so that its number, which is
    its group's, stays its own until the group is killed.
    """
    if process.returncode is not None:
        return process.returncode
    found = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if found is None:
        return None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


class Launcher:
    """Keeps replicas running until all have come to the end.

    Args:
        start: starts one.
        host: under which replicas reach the store, which is in this process.
        least, most: replicas that the job takes.
        max_restarts: of a replica, one after another.
        command: to go on with.
        port: of the store; 0 takes a free one.
        patience_s: for how long fewer than the least may run, and others after one has come to the end.

    Raises:
        UsageError: the port is taken.
    """

    def __init__(
        self,
        start: Start,
        host: str,
        least: int,
        most: int,
        max_restarts: int,
        command: str,
        port: int = 0,
        patience_s: float = 0.0,
    ) -> None:
        self._start, self.least, self.most, self._command = start, least, most, command
        self._max_restarts = max_restarts
        self._patience_s = patience_s or environment().timeout_s
        try:
            server, self.port = tcp_store("localhost", port, timedelta(seconds=60), serves=True)
        except RuntimeError as error:
            raise UsageError(
                f"the elastic job's store cannot listen at port {port}: {error}; give a free one"
            ) from None
        self.address = f"{host}:{self.port}"
        self._store = PrefixStore(PREFIX, server)
        self.gangs = [Gang(replica) for replica in range(most)]
        self.num_restarts = 0
        self._dead: dict[Member, int] = {}
        self._write = threading.Lock()
        self._heard: dict[str, tuple[bytes, float]] = {}

    def run(self) -> int:
        """Run to the end; the exit code: 0 if a replica has come to the end of the training, and all that trained with
        it then have, too.
        """
        few_since, worst, done_since = time.monotonic(), 0, 0.0
        try:
            while not all(gang.has_ended for gang in self.gangs):
                now = time.monotonic()
                for gang in self.gangs:
                    worst = self._look(gang, now) or worst
                living = sum(bool(gang.processes) and not gang.has_ended for gang in self.gangs)
                if self._is_done():
                    self._end_untrained()
                    done_since = done_since or now
                    if now - done_since > self._patience_s:
                        return self._end_late(now - done_since)
                    time.sleep(LOOK_S)
                    continue
                if living >= self.least:
                    few_since = now
                why = self._why_not(living, now - few_since)
                if why:
                    self._tell(f"the job ends: {why}")
                    self._tell(f"go on from its last checkpoint with: {self._command}")
                    return worst if 0 < worst < 256 else 1
                time.sleep(LOOK_S)
            return self._torn() if self._is_done() else worst or 1
        finally:
            self._end_all()

    def _end_late(self, seconds: float) -> int:
        """Say who had not come to the end in time, and is ended; the exit code."""
        late = [gang.replica for gang in self.gangs if gang.processes and not gang.has_ended]
        self._tell(
            f"replicas {late} still ran {seconds:.0f} s after another had come to the end, and are ended: what they "
            "wrote may be missing. Raise ZGRAPH_TIMEOUT if it takes so long"
        )
        return 1

    def _end_untrained(self) -> None:
        """End replicas that are not in the last generation: the training has ended before they could join."""
        for gang in self.gangs if self._latest() is not None else ():
            if gang.processes and not gang.has_ended and not self._has_trained(gang):
                gang.kill()
                gang.has_ended = True
                self._tell(f"replica {gang.replica} is ended: the training ended before it could join")

    def _torn(self) -> int:
        """The exit code of a replica that died behind the last step; 0 if none did. It has taken that step: without
        it the others would have gone on in another generation.
        """
        made = self._latest()
        torn = [member for member in made.members if member in self._dead] if made is not None else []
        for member in torn:
            self._tell(f"what replica {member.replica} was to write at the end may be missing")
        return self._dead[torn[-1]] if torn else 0

    def _is_done(self) -> bool:
        """Whether some replica has come to the end of the training."""
        return any(gang.has_ended and gang.is_over() for gang in self.gangs)

    def _look(self, gang: Gang, now: float) -> int:
        """Start a replica whose time has come, and see whether it lives; the exit code of one that failed."""
        if gang.has_ended:
            return 0
        if not gang.processes:
            if now >= gang.due and not self._is_done():
                self._begin(gang, now)
            elif self._is_done():
                gang.has_ended = True
            return 0
        if gang.is_over():
            gang.has_ended = True
            return 0
        failure = gang.failure() or self._silence(gang, now)
        if failure is None:
            return 0
        why, code = failure
        gang.kill()
        for thread in gang.threads:
            thread.join(1.0)
        of_it = (words for rank, words in gang.said.items() if f"rank {rank} " in why or len(gang.processes) == 1)
        said, when = next(of_it, ("", 0.0))
        if said and now - when < LAST_S:
            why = f'{why}, having said "{said}"'
        code = code if code > 0 else 128 - code
        self._say_gone(gang, why, code)
        gang.num_deaths = 1 if now - gang.began > HEALTHY_S else gang.num_deaths + 1
        gang.processes = []
        if self._is_done():
            gang.has_ended = True
            self._tell(f"replica {gang.replica}: {why}; it is not started again, as another has come to the end")
        elif gang.num_deaths > self._max_restarts:
            gang.has_ended = True
            self._tell(f"replica {gang.replica} is given up after {gang.num_deaths} deaths: {why}")
        else:
            wait_s = min(BACKOFF_S * 2 ** (gang.num_deaths - 1), MOST_BACKOFF_S)
            gang.due = now + wait_s
            self._tell(f"replica {gang.replica}: {why}; it is started again in {wait_s:g} s")
            self.num_restarts += 1
        return code

    def _has_trained(self, gang: Gang) -> bool:
        """Whether the last life of a replica was in the last generation."""
        made = self._latest()
        return made is not None and self._member(gang) in made.members and self._member(gang).life > gang.life

    def _latest(self) -> Generation | None:
        with suppress(ValueError):
            return Generation.parse(word) if (word := latest_word(self._store)) else None
        return None

    def _silence(self, gang: Gang, now: float) -> tuple[str, int] | None:
        """Which rank of a replica has not been heard for long, since it has asked to join."""
        member = self._member(gang)
        if member.life <= gang.life or now - gang.looked < 1.0:
            return None
        gang.looked = now
        for shard in itertools.count():
            key = beat_key(member, shard)
            if not is_there(self._store, key):
                return None
            if len(gang.processes) > 1 and shard < len(gang.processes) and code_of(gang.processes[shard]) == 0:
                continue  # it came to its end, while another still writes, maybe
            word = peek(self._store, key)
            if self._heard.get(key, (b"", 0.0))[0] != word:
                self._heard[key] = word, now
            elif now - self._heard[key][1] > SILENT_S:
                return f"rank {shard} of it was silent for {SILENT_S:g} s, and it was killed", 1
        return None

    def _member(self, gang: Gang) -> Member:
        """The last life of a replica; life 0 if it has never asked to join."""
        key = f"lives/{gang.replica}"
        return Member(gang.replica, int(self._store.get(key)) if is_there(self._store, key) else 0)

    def _begin(self, gang: Gang, now: float) -> None:
        variables = {
            "ZGRAPH_ELASTIC_STORE": self.address,
            "ZGRAPH_ELASTIC": f"{self.least}:{self.most}",
            "ZGRAPH_ELASTIC_REPLICA": str(gang.replica),
        }
        gang.began, gang.said, gang.life = now, {}, self._member(gang).life
        gang.processes = self._start(gang.replica, variables)
        gang.threads = [
            threading.Thread(target=self._follow, args=(gang, rank, process), daemon=True)
            for rank, process in enumerate(gang.processes)
        ]
        for thread in gang.threads:
            thread.start()

    def _follow(self, gang: Gang, rank: int, process: subprocess.Popen[bytes]) -> None:
        """Hand on what a process says, a line at a time."""
        if process.stdout is None:
            return
        said = gang.said
        for line in process.stdout:
            text = line.decode(errors="replace").rstrip()
            if text.strip() and not WARNING.match(text.strip()):
                said[rank] = text.strip()[:300], time.monotonic()
            with self._write:
                sys.stdout.write(f"replica {gang.replica}: {text}\n")
                sys.stdout.flush()

    def _say_gone(self, gang: Gang, why: str, code: int) -> None:
        """Tell the other replicas at once, which would else have to miss it."""
        if (member := self._member(gang)).life > gang.life:
            self._dead[member] = code
            say_gone(self._store, member, why)

    def _why_not(self, living: int, seconds: float) -> str:
        """Why the job cannot go on; empty while it can."""
        given_up = sum(gang.has_ended for gang in self.gangs)
        if self.most - given_up < self.least:
            return f"{given_up} of {self.most} replicas are given up, and it takes {self.least}"
        if living < self.least and seconds > self._patience_s:
            return f"{living} of at least {self.least} replicas have run for {seconds:.0f} s"
        made = self._latest()
        if made is not None and not any(self._lives(member) for member in made.members):
            return f"no replica is left that has the state of step {made.step} or later"
        return ""

    def _lives(self, member: Member) -> bool:
        """Whether a member of a generation runs: it, and not one that was started in its place."""
        return member.replica < self.most and member not in self._dead and bool(self.gangs[member.replica].processes)

    def _tell(self, text: str) -> None:
        with self._write:
            sys.stderr.write(f"zgraph: {text}\n")
            sys.stderr.flush()

    def _end_all(self) -> None:
        """Leave nothing running: what does not end by itself is killed."""
        for gang in self.gangs:
            gang.end(signal.SIGTERM)
            gang.end(signal.SIGCONT)
        until = time.monotonic() + GRACE_S
        while any(code_of(one) is None for gang in self.gangs for one in gang.processes) and time.monotonic() < until:
            time.sleep(LOOK_S)
        for gang in self.gangs:
            gang.kill()


def ranks_here(
    command: Sequence[str],
    num_ranks: int,
    devices: Sequence[str] = (),
    prefix: Callable[[int], Sequence[str]] | None = None,
) -> Start:
    """How a replica is started on this host: each rank a process, which know each other by torchrun's variables.

    Args:
        command: of a rank.
        num_ranks: of a replica.
        devices: the GPUs here, which replicas share out; none on processors.
        prefix: put before the command of each replica.
    """

    def start(replica: int, variables: dict[str, str]) -> list[subprocess.Popen[bytes]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        words = [*(prefix(replica) if prefix is not None else ()), *command]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(num_ranks)}
        own = {**os.environ, **variables, **shared, "LOCAL_WORLD_SIZE": str(num_ranks)}
        if devices:
            own_devices = devices[replica * num_ranks : (replica + 1) * num_ranks]
            own["CUDA_VISIBLE_DEVICES"] = ",".join(own_devices)
        made = []
        for rank in range(num_ranks):
            of_rank = {**own, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONUNBUFFERED": "1"}
            made.append(_popen(words, of_rank))
        return made

    return start


def over_ssh(ssh: Sequence[str], hosts: Sequence[str], command: Callable[[int, dict[str, str]], str]) -> Start:
    """How a replica is started on its host, by ssh; what runs there ends with the connection.

    Args:
        ssh: the command, with its options.
        hosts: one of each replica.
        command: for the shell of a host, by the replica's number and its variables.
    """

    def start(replica: int, variables: dict[str, str]) -> list[subprocess.Popen[bytes]]:
        return [_popen([*ssh, "--", hosts[replica], command(replica, variables)], dict(os.environ))]

    return start


def _popen(words: Sequence[str], variables: dict[str, str]) -> subprocess.Popen[bytes]:
    pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        return subprocess.Popen(list(words), env=variables, start_new_session=True, **pipes)
    except FileNotFoundError:
        raise UsageError(f"there is no {shlex.quote(words[0])} here to start replicas with") from None
