"""A rank that is killed during training: the others end with an error that names it."""

from __future__ import annotations

import os
import signal
import time

import pytest
from torch.distributed.device_mesh import DeviceMesh

import zgraph
from zgraph.errors import PeerError

from .nets import Mlp, built, rows
from .pool import DIED, Pool

LIMIT_S = 30


def die(mesh: DeviceMesh, victim: int, stage: int, at: str) -> tuple[str, str, float]:
    """The error, its message and the seconds until it came, of a rank that lives on."""
    rank = mesh.get_local_rank()
    model = zgraph.compile(built(Mlp)(), stage=stage, mesh=mesh)
    for _ in range(2):
        model(*rows(rank)).backward()
    began = time.monotonic()
    try:
        for step in range(3):
            for moment in ("forward", "backward"):
                if (rank, step, moment) == (victim, 1, at):
                    os.kill(os.getpid(), signal.SIGKILL)
                if moment == "forward":
                    loss = model(*rows(rank))
                else:
                    loss.backward()
    except PeerError as error:
        return type(error).__name__, str(error), time.monotonic() - began
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(("victim", "stage", "at"), [(0, 3, "forward"), (2, 2, "backward")])
def test_the_others_say_who_is_gone(victim: int, stage: int, at: str) -> None:
    pool = Pool(3)
    try:
        answers = pool.run(die, 3, victim, stage, at, may_die=True, spoils=True)
    finally:
        pool.stop()
    assert answers[victim] is DIED
    for rank in {0, 1, 2} - {victim}:
        error, message, seconds = answers[rank]
        assert error == "PeerError"
        assert f"rank {victim}" in message
        assert "gone" in message
        assert seconds < LIMIT_S
