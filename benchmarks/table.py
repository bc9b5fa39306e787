"""The rows of a benchmark as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table
from rich.text import Text

from benchmarks.results import Row
from benchmarks.systems import Role

COLUMNS = (
    "stage",
    "step s",
    "quartiles",
    "vs best\nbaseline",
    "vs baseline\nof stage",
    "vs\nbound",
    "predicted\ns",
    "exposed\ns",
    "predicted\nexposed",
    "sent MB\n/step/rank",
    "sent\n/ 4Ψ",
    "ZeRO\n/ 4Ψ",
    "at rest\nMB",
    "peak\nMB",
    "predicted\npeak",
    "final\nloss",
)


def steps_table(title: str, rows: Iterable[Row]) -> Table:
    """One line a system; zgraph's are bold, and one that failed says why in place of its figures."""
    table = Table(title=title, title_justify="left", header_style="")
    table.add_column("system", no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify="right")
    errors = []
    for row in rows:
        style = "bold" if row.role is Role.ZGRAPH else "dim" if row.error else ""
        table.add_row(row.system, *_cells(row), style=style)
        if row.error:
            errors.append(f"{row.system}: {row.error}")
    table.caption = Text("\n".join(errors))
    table.caption_justify = "left"
    return table


def _cells(row: Row) -> tuple[str, ...]:
    spread = "-" if row.step_low_s is None else f"{row.step_low_s:.3f} to {row.step_high_s:.3f}"
    return (
        str(row.stage) if row.role is not Role.COMPUTE else "-",
        _number(row.step_s, 3),
        spread,
        _number(row.vs_best_peer, 2),
        _number(row.vs_stage_peer, 2),
        _number(row.vs_bound, 2),
        _number(row.predicted_s, 3),
        _number(row.exposed_s, 3),
        _number(row.predicted_exposed_s, 3),
        _number(_mega(row.sent_bytes), 1),
        _number(row.sent_ratio, 3),
        _number(row.zero_ratio, 3),
        _number(_mega(row.rest_bytes), 1),
        _number(_mega(row.peak_bytes), 1),
        _number(_mega(row.predicted_peak_bytes), 1),
        _number(row.final_loss, 5),
    )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _mega(num_bytes: float | None) -> float | None:
    return None if num_bytes is None else num_bytes / 1e6
