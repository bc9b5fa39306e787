"""Bytes alive over a step, as a chart of characters: one colour a category."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from rich.text import Text

from zgraph.cost import MemoryCurve, Moment

STYLES = {
    "activations": ("a", "cyan"),
    "temporaries": ("t", "white"),
    "gathered": ("p", "green"),
    "gradients": ("g", "magenta"),
    "buckets": ("b", "yellow"),
}
"""Letter and colour of each category; the letter tells them apart where there is no colour."""


def memory_chart(curve: MemoryCurve, width: int = 72, height: int = 8) -> Text:
    """The curve from the first node of the forward to the last of the backward.

    Args:
        curve: bytes by category at each node.
        width: columns; each shows the highest of its moments.
        height: lines; the highest moment fills them all.
    """
    chart = Text()
    if not curve.moments or not curve.peak.total_bytes:
        return chart
    columns = [_column(moment, curve.peak.total_bytes, height) for moment in _highest(curve.moments, width)]
    for line in reversed(range(height)):
        for column in columns:
            name = column[line]
            chart.append(*(STYLES.get(name, ("?", "")) if name else (" ", "")))
        chart.append("\n")
    turn = next((i for i, m in enumerate(_highest(curve.moments, width)) if m.phase != "fwd"), len(columns))
    chart.append(("forward".ljust(turn)[:turn] + "backward")[: len(columns)] + "\n", "dim")
    used = {name for column in columns for name in column if name}
    for name, (letter, style) in STYLES.items():
        if name in used:
            chart.append(letter, style).append(f" {name}  ")
    return chart


def _highest(moments: Sequence[Moment], width: int) -> list[Moment]:
    """The highest moment of each of `width` equal parts."""
    num_columns = min(width, len(moments))
    bounds = [len(moments) * i // num_columns for i in range(num_columns + 1)]
    return [max(moments[a:b], key=lambda m: m.total_bytes) for a, b in pairwise(bounds)]


def _column(moment: Moment, peak_bytes: int, height: int) -> list[str]:
    """The category in each line of a column, from the bottom; empty above its top."""
    column: list[str] = []
    total = 0
    for name in STYLES:
        total += moment.bytes_by_category.get(name, 0)
        column.extend([name] * (round(height * total / peak_bytes) - len(column)))
    return (column + [""] * height)[:height]
