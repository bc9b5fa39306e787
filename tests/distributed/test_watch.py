"""Ranks whose waits are their device's: the heartbeat finds out that a collective never ends, aborts it and says why.

The processor stands for the device: nothing polls, so that without the heartbeat these ranks would wait for hours.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deep import deep

from .scripts import run_ranks

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
    ranks = run_ranks(tmp_path, SCRIPT, num_ranks, how, str(culprit), through)
    for rank, ended in enumerate(ranks):
        if rank == culprit and how != "skips":
            continue
        assert f"{error}: " in ended.errors, ended.errors
        for word in said:
            assert word in ended.errors, ended.errors
        seconds = ended.at - float(ended.out.split()[0])
        assert seconds < 20, f"rank {rank} took {seconds:.1f} s"
