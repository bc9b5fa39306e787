"""Completions that shells offer for an argument: names of passes, of hardware, of graphs. Anything else is a file."""

from __future__ import annotations

import re
from collections.abc import Callable

from zgraph.cost import known
from zgraph.cost.hardware import THIS_MACHINE
from zgraph.passes import known_passes

Completer = Callable[[str], list[str]]


def any_of(*words: str) -> Completer:
    """Completes to one of these."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return complete


def pass_names(incomplete: str) -> list[str]:
    """The passes that start so: zgraph's own, and those of installed packages."""
    return any_of(*known_passes())(incomplete)


def several_passes(incomplete: str) -> list[str]:
    """Passes separated by commas, of which the last is completed."""
    before, comma, last = incomplete.rpartition(",")
    return [before + comma + name for name in pass_names(last)]


def hardware_names(incomplete: str) -> list[str]:
    """A profile's name, alone or behind HOSTSxDEVICES-."""
    shape = re.match(r"\d+x\d+-|", incomplete)
    assert shape is not None
    names = any_of(*known(), THIS_MACHINE)(incomplete[shape.end() :])
    return [shape.group() + name for name in names]
