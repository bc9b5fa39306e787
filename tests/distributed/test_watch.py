"""Ranks whose waits are their device's: the heartbeat finds out that a collective never ends, aborts it and says why.

The processor stands for the device: nothing polls, so that without the heartbeat these ranks would wait for hours.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import zgraph
from tests.deep import deep

SCRIPT = """
import os, signal, sys, time
import torch, zgraph
from torch import nn
from zgraph.runtime import peers
from zgraph.runtime.session import Session

peers._is_host = lambda device: False
if sys.argv[3] == "backend":
    Session._open_lane = lambda self: None
zgraph.init_distributed("gloo")
rank, how, culprit = torch.distributed.get_rank(), sys.argv[1], int(sys.argv[2])


class Net(nn.Sequential):
    fails = False

    def forward(self, x):
        if self.fails:
            raise ValueError("the user's own error")
        return super().forward(x)


torch.manual_seed(0)
model = zgraph.compile(Net(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)), stage=3)
for step in range(4):
    skips = False
    if step == 2:
        print(time.time(), flush=True)
    if step == 2 and rank == culprit:
        if how == "loader":
            raise ValueError("the data loader is out of rows")
        if how == "ends":
            sys.exit(0)
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        model.fails, skips = how == "forward", how == "skips"
    loss = model(torch.ones(3, 8)).sum()
    if not skips:
        loss.backward()
"""


def run(tmp_path: Path, num_ranks: int, *args: str) -> list[tuple[str, float]]:
    """The errors of each rank, and the seconds from the mistake to its end."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in range(num_ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
        own["PYTHONPATH"] = str(Path(zgraph.__file__).parent.parent)
        names = {**os.environ, **own, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(script), *args]
        ranks.append(subprocess.Popen(command, env=names, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    try:
        answers = []
        for process in ranks:
            out, errors = process.communicate(timeout=90)
            answers.append((errors, time.time() - float(out.split()[0])))
        return answers
    finally:
        for process in ranks:
            process.kill()


@pytest.mark.parametrize(
    ("num_ranks", "how", "culprit", "through", "error", "said"),
    [
        deep(2, "forward", 1, "lane", "PeerError", ("rank 1", "ValueError", "the user's own error")),
        deep(2, "forward", 0, "lane", "PeerError", ("rank 0", "ValueError", "the user's own error")),
        (2, "loader", 0, "lane", "PeerError", ("rank 0 ended by ValueError: the data loader is out of rows",)),
        deep(4, "loader", 1, "backend", "PeerError", ("rank 1 ended by ValueError: the data loader is out of rows",)),
        deep(2, "ends", 1, "lane", "PeerError", ("rank 1 came to the end of its script",)),
        (2, "skips", 1, "lane", "PlanMismatchError", ("drifted apart", "rank 0 is at", "rank 1 is at", "in call 3")),
        deep(2, "killed", 1, "backend", "PeerError", ("rank 1", "gone")),
    ],
)
def test_the_others_end_with_the_reason(
    tmp_path: Path, num_ranks: int, how: str, culprit: int, through: str, error: str, said: tuple[str, ...]
) -> None:
    answers = run(tmp_path, num_ranks, how, str(culprit), through)
    for rank in range(num_ranks):
        errors, seconds = answers[rank]
        if rank == culprit and how != "skips":
            continue
        assert f"{error}: " in errors, errors
        for word in said:
            assert word in errors, errors
        assert seconds < 20, f"rank {rank} took {seconds:.1f} s"
