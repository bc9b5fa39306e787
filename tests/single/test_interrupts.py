"""Ctrl-C ends a rank with one line; other errors, and hooks of the user's own, are as they were."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from zgraph.errors import PeerError
from zgraph.runtime.interrupts import quiet, was_interrupted

ROOT = Path(__file__).parents[2]

TRAINS = """
import os, sys
import torch, zgraph
{setup}
model = zgraph.compile(torch.nn.Linear(4, 4))
model(torch.ones(2, 4)).sum().backward()
os.write(1, b"ready\\n")  # one write, since ranks share the pipe and Python's may be two
while True:
    model(torch.ones(2, 4)).sum().backward()
"""


def interrupted(folder: Path, *before: str, setup: str = "", **env: str) -> tuple[int, list[str]]:
    """The exit code, and the lines on standard error, of a script that is interrupted as by Ctrl-C."""
    script = folder / "train.py"
    script.write_text(TRAINS.format(setup=setup))
    process = subprocess.Popen(
        [sys.executable, *before, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ZGRAPH_LOGS": "none", **env},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=300)
    return process.returncode, error.splitlines()


def test_one_line(tmp_path: Path) -> None:
    assert interrupted(tmp_path) == (-signal.SIGINT, ["zgraph: rank 0 was interrupted"])


def test_a_hook_of_the_users_own_stays(tmp_path: Path) -> None:
    setup = "sys.excepthook = lambda *error: sys.stderr.write(f'mine: {error[0].__name__}\\n')"
    assert interrupted(tmp_path, setup=setup)[1] == ["mine: KeyboardInterrupt"]


def test_all_of_it_where_that_is_asked(tmp_path: Path) -> None:
    lines = interrupted(tmp_path, ZGRAPH_TRACEBACK="full")[1]
    assert lines[0].startswith("Traceback")
    assert lines[-1].startswith("KeyboardInterrupt")


def test_one_line_a_rank(tmp_path: Path) -> None:
    setup = "torch.distributed.init_process_group('gloo')"
    code, lines = interrupted(tmp_path, "-m", "zgraph", "launch", "--nproc-per-node", "2", setup=setup)
    assert code == 128 + signal.SIGINT
    assert sorted(lines) in (
        ["zgraph: rank 0 was interrupted", "zgraph: rank 1 was interrupted"],
        ["zgraph: rank 0 was interrupted", "zgraph: rank 1 was interrupted", ""],
    )


def test_other_errors_are_told_as_before(capsys: pytest.CaptureFixture[str]) -> None:
    hook = quiet(sys.__excepthook__)
    for error in (ValueError("mine"), PeerError("another rank failed: ValueError on rank 1: mine")):
        assert not was_interrupted(error)
        hook(type(error), error, None)
        assert str(error) in capsys.readouterr().err
    told = PeerError("another rank failed: KeyboardInterrupt on rank 1: ")
    assert was_interrupted(told)
    hook(PeerError, told, None)
    assert capsys.readouterr().err == "zgraph: rank 0 was interrupted\n"
