"""Scripts that run as ranks of their own, without the pool: what ends with them, and how."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import zgraph


@dataclass(frozen=True)
class Ended:
    """A rank that has ended: its exit status, what it printed, and the time of the clock when it was seen to end."""

    code: int
    out: str
    errors: str
    at: float


def run_ranks(folder: Path, script: str, num_ranks: int, *args: str) -> list[Ended]:
    """A script on ranks that know each other by torchrun's variables; all of them are killed after 90 s."""
    path = folder / "train.py"
    path.write_text(script)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(num_ranks)}
    shared["PYTHONPATH"] = str(Path(zgraph.__file__).parent.parent)
    ranks = [
        subprocess.Popen(
            [sys.executable, str(path), *args],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    try:
        ended = []
        for process in ranks:
            out, errors = process.communicate(timeout=90)
            ended.append(Ended(process.returncode, out, errors, time.time()))
        return ended
    finally:
        for process in ranks:
            process.kill()
