"""Writes README.md of this folder from the passes themselves: `python -m zgraph.passes.core.readme`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable
from pathlib import Path

from zgraph.passes import ALL, RECIPES, Pass
from zgraph.passes.core.pipeline import print_size

PATH = Path(__file__).parents[1] / "README.md"

_HEAD = """\
# The passes

A pass takes a valid graph and returns a valid graph; its fields are its options. What it `requires` must have been
`provided` by a pass before it. Numerics: `exact` passes keep every number to the last bit, `reassociates` means that
sums over ranks may be taken in another order. The source of each pass shows a graph before and after it.

This page is written by `python -m zgraph.passes.core.readme`.
"""

_COLUMNS = ("pass", "what it does", "numerics", "requires", "provides", "options and their defaults")


def render() -> str:
    """The page."""
    rows = [_row(_COLUMNS), _row("---" for _ in _COLUMNS), *(_row(_cells(kind)) for kind in ALL)]
    recipes = [f"- stage {stage}: `{text}`" for stage, text in RECIPES.items()]
    return "\n".join([_HEAD, *rows, "", "## The recipes", "", *recipes, ""])


def _cells(kind: type[Pass]) -> Iterable[str]:
    yield f"`{kind.name}`"
    yield (inspect.getdoc(kind) or "").splitlines()[0]
    yield kind.numerics.value
    yield ", ".join(sorted(kind.requires))
    yield ", ".join(sorted(kind.provides))
    defaults = {f.name: getattr(kind(), f.name) for f in dataclasses.fields(kind)}
    yield ", ".join(f"`{n}={print_size(v) if n.endswith('_bytes') else v}`" for n, v in defaults.items())


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    PATH.write_text(render())
