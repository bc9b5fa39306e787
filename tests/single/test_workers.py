"""Tasks side by side in forked processes."""

import os
import signal
from functools import partial

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
