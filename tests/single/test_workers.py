"""Tasks side by side in forked processes."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from zgraph.errors import UsageError
from zgraph.estimate.workers import side_by_side


def test_results_come_in_the_order_of_tasks_from_other_processes():
    """Tasks are closures, which cannot be pickled."""
    with side_by_side([lambda n=n: (n * n, os.getpid()) for n in range(5)], num_workers=2) as results:
        found = list(results)
    assert [square for square, _ in found] == [0, 1, 4, 9, 16]
    assert os.getpid() not in {pid for _, pid in found}


def test_a_task_that_fails_raises_its_error_here():
    """An error with arguments of its own need not be picklable, and nothing is left running."""

    def fail():
        raise UsageError("take fewer")

    tasks = [partial(int, "1"), fail, partial(int, "2")]
    with pytest.raises(UsageError, match="take fewer"), side_by_side(tasks, num_workers=2) as results:
        list(results)


def test_a_task_whose_process_is_killed_runs_here():
    here = os.getpid()

    def killed():
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return "here"

    with side_by_side([killed, killed], num_workers=2) as results:
        assert list(results) == ["here", "here"]


def test_one_task_or_one_worker_needs_no_process():
    with side_by_side([os.getpid], num_workers=4) as one, side_by_side([os.getpid] * 2, num_workers=1) as two:
        assert {*one, *two} == {os.getpid()}


def test_processes_end_with_the_one_that_waits_for_them(tmp_path):
    """Killed, it cannot end them itself."""
    code = f"""
import os, pathlib, time
from zgraph.estimate.workers import side_by_side

def task():
    (pathlib.Path({str(tmp_path)!r}) / str(os.getpid())).touch()
    time.sleep(600)

with side_by_side([task, task], num_workers=2) as results:
    list(results)
"""
    with subprocess.Popen([sys.executable, "-c", code]) as waiting:
        wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
        waiting.kill()
    workers = [int(path.name) for path in tmp_path.iterdir()]
    wait_for(lambda: not any(map(is_running, workers)))


def wait_for(condition, seconds=120):
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to hold"
        time.sleep(0.05)


def is_running(pid):
    """Whether a process runs, and is not only waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
