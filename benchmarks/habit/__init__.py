"""Habits of training code, each a function that is run eagerly and by zgraph."""

from __future__ import annotations

from benchmarks.habit import around, hooks, loops, losses, modules, optimizers, saving
from benchmarks.habit.table import Habit

GROUPS = (losses, loops, around, hooks, modules, saving, optimizers)


def habits() -> list[Habit]:
    """All habits, in the order of the page."""
    return [habit for group in GROUPS for habit in group.TABLE]
