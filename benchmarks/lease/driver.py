"""Runs the parts of a lease, one after the other, each in processes of its own, and ends those that take too long."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from benchmarks.errors import NoGpu
from benchmarks.lease import results
from benchmarks.lease.parts import LIMIT_S, PARTS, Part
from benchmarks.lease.results import Result

ROOT = Path(__file__).parents[2]

NO_GPU = 3
"""Exit code of a part that finds none: the others would not either."""

GRACE_S = 10.0
"""Time for the other ranks to end after one has failed."""

RESERVE_S = 3.0
"""Time for the driver itself, at the end."""


@dataclass(frozen=True)
class Lease:
    """A lease, and what is done with it.

    Args:
        folder: for results.
        parts: in their order.
        limit_s: seconds of all of them.
        is_small: tiny sizes, for a rehearsal.
        module: of the processes, which get the name of a part and its options.
    """

    folder: Path
    parts: tuple[Part, ...] = PARTS
    limit_s: float = LIMIT_S
    is_small: bool = False
    module: str = "benchmarks.lease"

    def run(self, tell: Callable[[Part, list[Result]], None] = lambda part, found: None) -> list[Result]:
        """All results, the last of them a summary. Those of a part are told when it has ended.

        Raises:
            NoGpu: a part finds none.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        _, offset = results.read(self.folder)
        began = time.monotonic()
        found: list[Result] = []
        for part in self.parts:
            left_s = self.limit_s - (time.monotonic() - began) - RESERVE_S
            self._run_part(part, left_s, offset)
            more, offset = results.read(self.folder, offset)
            found += more
            tell(part, more)
        found.append(summary(found, time.monotonic() - began))
        results.write(self.folder, found[-1])
        return found

    def _run_part(self, part: Part, left_s: float, offset: int) -> None:
        """Run a part, and once more if it broke down on its way: with what it had not come to."""
        until = time.monotonic() + min(left_s, part.limit_s)
        for is_again in (False, True):
            limit_s = until - time.monotonic()
            if limit_s < part.least_s:
                if not is_again:
                    self._write(part, "left out", None, f"{max(left_s, 0):.0f} s were left", 0.0)
                return
            before, _ = results.read(self.folder, offset)
            began = time.monotonic()
            ended = self._watch(part, limit_s, offset)
            seconds = time.monotonic() - began
            if ended is None:
                results.write(self.folder, Result(part.name, "finished", seconds=seconds))
                return
            after, _ = results.read(self.folder, offset)
            last = f" after {after[-1].name!r}" if after else ""
            why = f"{ended.why}{last}; the last line of {self._log(part).name}: {ended.last_line}"
            self._write(part, "killed" if ended.is_late else "broke down", False, why, seconds)
            if ended.code == NO_GPU:
                raise NoGpu(ended.last_line.rstrip("."), f"See {self._log(part)}")
            if ended.is_late or part.num_ranks > 1 or len(after) == len(before):
                return

    def _watch(self, part: Part, limit_s: float, offset: int) -> Ended | None:
        """Run the processes of a part until they end, or are ended."""
        log = self._log(part)
        with open(log, "ab") as file:
            port = _free_port() if part.num_ranks > 1 else 0
            processes = [
                subprocess.Popen(
                    self._command(part, limit_s, offset),
                    cwd=ROOT,
                    env=self._environment(part, rank, port),
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                for rank in range(part.num_ranks)
            ]
        try:
            codes = _codes(processes, time.monotonic() + limit_s)
        finally:
            for process in processes:
                _end(process)
        bad = [code for code in codes if code]
        if not bad and None not in codes:
            return None
        return Ended(bad[0] if bad else None, limit_s, _last_line(log))

    def _command(self, part: Part, limit_s: float, offset: int) -> list[str]:
        given = ["--out", str(self.folder.absolute()), "--seconds", f"{limit_s:.1f}", "--offset", str(offset)]
        return [sys.executable, "-u", "-m", self.module, "part", part.name, *given, *["--small"] * self.is_small]

    def _environment(self, part: Part, rank: int, port: int) -> dict[str, str]:
        cache = self.folder.absolute() / "cache"
        made = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            "XDG_CACHE_HOME": str(cache),
            "TRITON_CACHE_DIR": str(cache / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        }
        if part.num_ranks > 1:
            ranks = {"RANK": rank, "WORLD_SIZE": part.num_ranks, "LOCAL_RANK": 0, "MASTER_PORT": port}
            made |= {"MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in ranks.items()}}
        return made

    def _log(self, part: Part) -> Path:
        return self.folder / f"{part.name}.log"

    def _write(self, part: Part, name: str, ok: bool | None, why: str, seconds: float) -> None:
        results.write(
            self.folder, Result(part.name, name, ok, seconds=seconds, more={"error" if ok is False else "note": why})
        )


@dataclass(frozen=True)
class Ended:
    """The end of a part that failed.

    Args:
        code: the exit code, negative for a signal; None where it ran for too long.
        limit_s: that it had.
        last_line: of its log.
    """

    code: int | None
    limit_s: float
    last_line: str

    @property
    def is_late(self) -> bool:
        return self.code is None

    @property
    def why(self) -> str:
        if self.code is None:
            return f"it ran for more than {self.limit_s:.0f} s"
        if self.code < 0:
            return f"signal {signal.Signals(-self.code).name}"
        return f"exit code {self.code}"


def summary(found: Sequence[Result], seconds: float) -> Result:
    """How many checks passed and failed, and how many parts were left out."""
    counts = {f"num_{word}": sum(r.ok is ok for r in found) for word, ok in (("passed", True), ("figures", None))}
    num_failed = sum(r.ok is False for r in found)
    left_out = sorted({r.part for r in found if r.name == "left out"})
    return Result("lease", "summary", not num_failed, num_failed, "failed", seconds, {**counts, "left_out": left_out})


@contextlib.contextmanager
def ending_children() -> Iterator[None]:
    """Context in which SIGTERM ends this process as Ctrl-C does, and not without its children."""

    def end(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _codes(processes: Sequence[subprocess.Popen[bytes]], until: float) -> list[int | None]:
    """The exit code of each process, None for one that still runs when the time is over."""
    while True:
        codes = [_code(process) for process in processes]
        if None not in codes or time.monotonic() > until:
            return codes
        if any(codes):
            until = min(until, time.monotonic() + GRACE_S)
            processes_left = [p for p, code in zip(processes, codes, strict=True) if code is None]
            while time.monotonic() < until and any(_code(p) is None for p in processes_left):
                time.sleep(0.05)
            return [_code(process) for process in processes]
        time.sleep(0.05)


def _code(process: subprocess.Popen[bytes]) -> int | None:
    """The exit code; the process stays as it is until `_end`, so that the number of its group is nobody else's."""
    if process.returncode is not None:
        return process.returncode
    found = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if found is None:
        return None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a process and of those that it started."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it is empty"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
