"""A habit of training code, and tables of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from benchmarks.habit.side import Side

Found = Mapping[str, Tensor | float]
"""Outcome of a habit: losses and values, by name. Both sides must have found the same."""
Run = Callable[[Side], Found]


@dataclass(frozen=True)
class Habit:
    """Something that people do in training code.

    Args:
        name: of the function.
        words: the habit, for a reader.
        group: what it is about.
        run: does it on a side.
        tolerance: the largest relative difference that is still equal.
        ranks: the numbers of ranks that it makes sense on.
        package: that it needs.
    """

    name: str
    words: str
    group: str
    run: Run
    tolerance: float = 1e-5
    ranks: tuple[int, ...] = (1, 2)
    package: str = ""


class Table(list[Habit]):
    """The habits of one group.

    Args:
        group: what they are about.
    """

    def __init__(self, group: str) -> None:
        super().__init__()
        self.group = group

    def habit(
        self, words: str, *, tolerance: float = 1e-5, ranks: tuple[int, ...] = (1, 2), package: str = ""
    ) -> Callable[[Run], Run]:
        """A decorator that lists a function as a habit."""

        def listed(run: Run) -> Run:
            self.append(Habit(run.__name__, words, self.group, run, tolerance, ranks, package))
            return run

        return listed
