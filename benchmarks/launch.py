"""Start one process a rank on the given hosts, wait for all of them, and leave none behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.errors import RankFailed, RankTimedOut
from benchmarks.hosts import Host
from benchmarks.job import Job, RankReport

POLL_S = 0.1
REPOSITORY = Path(__file__).resolve().parents[1]

Rank = subprocess.Popen[bytes]
Reports = list[RankReport]


def launch(job: Job, hosts: Sequence[Host], *, timeout_s: float, logs: Path | None = None) -> Reports:
    """Run `job`, rank r on `hosts[r]`, and return the reports in the order of the ranks.

    logs: a folder in which to keep what each rank wrote.

    Raises RankFailed with the first failing rank's last words, or RankTimedOut after `timeout_s` seconds. In
    every case, Ctrl-C too, each process that was started here has ended when this is left.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"{job.system}-{job.measure}-".replace(" ", "-"), dir=logs))
    job.write(folder)
    ranks: list[Rank] = []
    try:
        for rank in range(job.world_size):
            ranks.append(_start(job, folder, rank, hosts[rank]))
        _wait(ranks, folder, timeout_s)
        return [RankReport.read(folder, rank) for rank in range(job.world_size)]
    finally:
        for process in ranks:
            _end(process)
        if logs is None:
            shutil.rmtree(folder)


def _start(job: Job, folder: Path, rank: int, host: Host) -> Rank:
    counted = [host.interface] if host.counts_bytes else []
    command = [*host.prefix, sys.executable, "-m", "benchmarks.worker", str(folder), str(rank), *counted]
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank if host.prefix == () else 0),
        "WORLD_SIZE": str(job.world_size),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": host.interface,
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
    }
    with _log_file(folder, rank).open("wb") as log:
        return subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log, start_new_session=True
        )


def _wait(ranks: Sequence[Rank], folder: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        codes = [process.poll() for process in ranks]
        for rank, code in enumerate(codes):
            if code:
                raise RankFailed(
                    f"rank {rank}: {_last_words(folder, rank, code)}",
                    "Run the system alone with --systems and --logs to read all of it",
                )
        if all(code == 0 for code in codes):
            return
        if time.monotonic() > deadline:
            late = [rank for rank, code in enumerate(codes) if code is None]
            raise RankTimedOut(
                f"ranks {late} did not end within {timeout_s:.0f} s",
                "Give them longer with --timeout, or take fewer steps",
            )
        time.sleep(POLL_S)


def _end(process: Rank) -> None:
    """End a rank and whatever it started: it leads a session of its own."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_words(folder: Path, rank: int, code: int) -> str:
    text = _log_file(folder, rank).read_text(errors="replace").replace(f"[rank{rank}]:", "")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else f"ended with code {code} and said nothing"


def _log_file(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.log"
