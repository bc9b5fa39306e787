"""Scripts of which one rank ends between calls: the others say how, whoever keeps the store."""

from __future__ import annotations

from pathlib import Path

import pytest

import zgraph
from tests.deep import deep
from zgraph.errors import UsageError
from zgraph.runtime.agreement import check_joined

from .nets import Mlp, built
from .scripts import run_ranks

SCRIPT = """
import sys
import torch, zgraph
from torch import nn
zgraph.init_distributed("gloo")
rank, how, culprit = torch.distributed.get_rank(), sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
model = zgraph.compile(model, stage=int(sys.argv[3]))
for step in range(4):
    if step == 2 and rank == culprit:
        if how == "raises":
            raise ValueError("the data loader is out of rows")
        if how == "ends":
            sys.exit(0)
    if step == 0 and how == "compiles" and rank == culprit:
        sys.exit(0)
    model(torch.ones(3, 8)).sum().backward()
"""


@pytest.mark.parametrize(
    ("num_ranks", "how", "said"),
    [
        (2, "raises", "rank 1 ended by ValueError: the data loader is out of rows"),
        deep(4, "ends", "rank 1 came to the end of its script"),
        (2, "compiles", "rank 1 came to the end of its script"),
    ],
)
def test_the_others_say_how_a_rank_ended(tmp_path: Path, num_ranks: int, how: str, said: str) -> None:
    ranks = run_ranks(tmp_path, SCRIPT, num_ranks, how, "1", "3")
    for rank in {*range(num_ranks)} - {1}:
        errors = ranks[rank].errors
        assert ranks[rank].code == 1, errors
        assert "PeerError" in errors, errors
        if rank == 0 or "key-value store" not in errors:
            assert said in errors


def test_the_rank_that_keeps_the_store_raises(tmp_path: Path) -> None:
    _, other = run_ranks(tmp_path, SCRIPT, 2, "raises", "0", "3")
    assert other.code == 1
    assert "PeerError: rank 0 ended by ValueError: the data loader is out of rows" in other.errors


def test_a_launcher_without_a_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"rank 1 of 2.*zgraph\.init_distributed"):
        zgraph.compile(built(Mlp)())


@pytest.mark.parametrize("names", [{}, {"WORLD_SIZE": "1", "RANK": "0"}, {"WORLD_SIZE": "2"}])
def test_one_rank_needs_no_process_group(names: dict[str, str]) -> None:
    assert check_joined(names) == ""
