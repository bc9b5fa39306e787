"""What shells offer for an argument: names of passes, of hardware, of graphs. Anything else is a file."""

from __future__ import annotations

import re
from collections.abc import Callable

from zgraph.cost import known
from zgraph.cost.hardware import THIS_MACHINE
from zgraph.passes import BY_NAME

Completer = Callable[[str], list[str]]


def any_of(*words: str) -> Completer:
    """Completes to one of these."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return complete


pass_names = any_of(*BY_NAME)


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
