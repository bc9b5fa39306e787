"""Habits of training code, each a function that is run eagerly and by zgraph."""

from __future__ import annotations

from benchmarks.habit import (
    around,
    forwards,
    hooks,
    loops,
    losses,
    modules,
    optimizers,
    policies,
    precision,
    saving,
    updates,
)
from benchmarks.habit.table import Habit

GROUPS = (losses, policies, loops, precision, updates, around, hooks, modules, forwards, saving, optimizers)


def habits() -> list[Habit]:
    """All habits, in the order of the page."""
    return [habit for group in GROUPS for habit in group.TABLE]
