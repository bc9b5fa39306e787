"""The table of habits: its rows run, and its page tells the results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.habit import habits
from benchmarks.habit.side import Side
from benchmarks.habit.table import Found, Habit
from benchmarks.habits import Outcome, tried
from benchmarks.habits_page import page

HOME = Path(__file__).parents[2]
BLANK = Outcome("", "", "", 3, 1, "not run")


def test_there_are_many_and_each_has_a_name_of_its_own() -> None:
    names = [habit.name for habit in habits()]
    assert len(names) >= 80
    assert len({*names}) == len(names)


@pytest.mark.parametrize(("name", "verdict"), [("loss_outside", "equal"), ("new_head", "refused")])
def test_a_habit_is_run_both_ways(name: str, verdict: str) -> None:
    habit = next(habit for habit in habits() if habit.name == name)
    assert tried(habit, BLANK).verdict == verdict


def test_another_result_is_told_as_wrong() -> None:
    def run(side: Side) -> Found:
        return {"loss": 1.0 + side.is_zgraph}

    outcome = tried(Habit("odd", "", "", run), BLANK)
    assert (outcome.verdict, outcome.difference, outcome.where) == ("wrong", 1.0, "loss")


def test_the_page_is_that_of_the_results() -> None:
    found = json.loads((HOME / "benchmarks/results/habits.json").read_text())
    assert (HOME / "docs/habits.md").read_text() == page(found["results"], found["environment"])
    bad = {"wrong", "failed", "hangs"}
    assert not [row["name"] for row in found["results"] if row["verdict"] in bad]
