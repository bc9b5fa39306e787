"""Ranks of one command that compute together: those that a launcher has started, or processes that it starts itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta

from zgraph.cli.app import ended_by
from zgraph.cli.environment_report import cores
from zgraph.errors import PeerError, UsageError

LINGER_S = 3.0
"""How long this rank has to find by itself why another has ended, before it is ended too."""
HOST = "127.0.0.1"
STORE_S = 60
"""Seconds that an answer of the store may take."""

GRACE_S = 10.0
"""How long the other ranks have to end by themselves, once the first is through."""
_STORES: list[object] = []
"""Stores that this process keeps, to its end: its heartbeat writes to one until then."""
LAST_BYTES = 4096
"""Of what a rank wrote to its standard error, for the message of its end."""


def is_first() -> bool:
    """Whether this is the first rank, or the only one."""
    return _launched() == 1 or os.environ["RANK"] == "0"


def _launched() -> int:
    """The ranks that a launcher has started, this one among them; 1 without a launcher."""
    count = os.environ.get("WORLD_SIZE", "1")
    return int(count) if count.isdigit() and "RANK" in os.environ else 1


@contextmanager
def together(num_ranks: int) -> Iterator[int]:
    """Join so many ranks for what is within; this rank's number.

    Without a launcher this process is the first, and starts the others: each runs the same command. At the end they
    have GRACE_S seconds to end, too. SIGTERM ends the first rank, if nothing within handles it; the others end with it,
    and with no signal.

    Args:
        num_ranks: all of them.

    Raises:
        UsageError: a launcher has started another number of ranks.
        PeerError: a rank has ended before this one was through.
    """
    launched = _launched()
    if launched not in (1, num_ranks):
        raise UsageError(
            f"a launcher started this as rank {os.environ['RANK']} of {launched}; pass --tensor-parallel {launched}, "
            "or run the command without a launcher: it starts its ranks itself"
        )
    if num_ranks == 1:
        yield 0
        return
    before = signal.signal(signal.SIGTERM, ended_by)
    _share_cores(num_ranks if launched == 1 else int(os.environ.get("LOCAL_WORLD_SIZE", launched)))
    others = Others(num_ranks) if launched == 1 else None
    try:
        with _environment(others.meeting | {"RANK": "0", "LOCAL_RANK": "0"} if others is not None else {}):
            rank = _joined()
        yield rank
    except BaseException as error:
        if others is not None:
            others.kill()
            if isinstance(error, SystemExit) and others.died:
                raise PeerError(others.died) from None
        raise
    else:
        if others is not None and others.died:
            raise PeerError(others.died)
        if others is not None:
            others.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
        if others is not None:
            others.kill()


def _joined() -> int:
    """Join the process group; this rank. The others leave it to the first when to end, so that it can end well."""
    from zgraph.runtime.rendezvous import join_ranks

    rank = int(os.environ["RANK"])
    join_ranks("gloo")
    if rank:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
    return rank


@contextmanager
def _environment(found: Mapping[str, str]) -> Iterator[None]:
    """Variables of this process for a while."""
    before = {name: os.environ.get(name) for name in found}
    os.environ.update(found)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _share_cores(num_ranks: int) -> None:
    """Give each of the ranks on this machine its share of the cores, where nothing else is said."""
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        os.environ["OMP_NUM_THREADS"] = str(max(cores() // num_ranks, 1))
        torch.set_num_threads(max(cores() // num_ranks, 1))


def _file() -> int:
    """The descriptor of a file without a name."""
    number, name = tempfile.mkstemp()
    os.unlink(name)
    return number


class Others:
    """The other ranks, as processes of the same command, and the store where they meet.

    Args:
        num_ranks: this one among them.

    Attributes:
        meeting: the variables that tell ranks where they meet.
        died: how one has ended before its time; empty if none has.
    """

    def __init__(self, num_ranks: int) -> None:
        from zgraph.bridge.private_runtime import tcp_store

        store, port = tcp_store(HOST, 0, timedelta(seconds=STORE_S), serves=True)
        _STORES.append(store)
        self.meeting = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": HOST, "MASTER_PORT": str(port)}
        self.meeting |= {"LOCAL_WORLD_SIZE": str(num_ranks), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        self.died, self._over = "", threading.Event()
        self._said = [_file() for _ in range(1, num_ranks)]
        self.running = [
            subprocess.Popen(
                [sys.executable, "-m", "zgraph", *sys.argv[1:]],
                env={**os.environ, **self.meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                start_new_session=True,  # what interrupts the first in a terminal does not reach them
            )
            for rank, said in enumerate(self._said, 1)
        ]
        for rank in range(1, num_ranks):
            threading.Thread(target=self._follow, args=(rank,), name="zgraph-rank", daemon=True).start()

    def wait(self) -> None:
        """Wait until all have ended, GRACE_S seconds at most."""
        self._over.set()
        until = time.monotonic() + GRACE_S
        for process in self.running:
            try:
                process.wait(max(until - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                return

    def kill(self) -> None:
        """End those that still run, at once: they hold nothing of their own."""
        self._over.set()
        for process in self.running:
            process.kill()
            process.wait()

    def _follow(self, rank: int) -> None:
        """Tell of a rank that ends before its time: those that wait for it, and then the main thread."""
        from zgraph.bridge.private_runtime import store
        from zgraph.runtime.alarms import Alarm, raise_alarm

        code = self.running[rank - 1].wait()
        if self._over.is_set():
            return
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        said = self._last_words(rank)
        self.died = self.died or f"rank {rank} {how}{f': {said}' if said else ''}"
        with suppress(ValueError, RuntimeError):  # not joined yet
            raise_alarm(store(), Alarm("left", "", rank, how))
        if not self._over.wait(LINGER_S):  # what this rank finds by itself says more
            os.kill(os.getpid(), signal.SIGTERM)

    def _last_words(self, rank: int) -> str:
        """The last line that a rank has written to its standard error."""
        with os.fdopen(self._said[rank - 1], "rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - LAST_BYTES, 0))
            lines = file.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")
