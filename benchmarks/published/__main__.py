"""Steps that others measured and published, beside what zgraph predicts: python -m benchmarks.published

`data/` holds them with their sources. Each row goes the way of the product: a captured model, its recipe, the schedule,
the simulation, and the optimizer's update, at the costs of the built-in profiles. `--rows FILE.csv` takes any file of
the same columns. `--fit` fits the constants of the profiles to the rows again, leaving one system out at a time for the
errors and the error bars that are told, and writes them into `zgraph/cost/profiles`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.published.conformal import Residual, accuracy, coverage
from benchmarks.published.fit import PRIORS, fit, step_s
from benchmarks.published.predict import Prediction, costs_of, predicted
from benchmarks.published.rows import FILES, Row, Unread, read
from benchmarks.published.store import store
from zgraph.cost import Interval, memory_interval
from zgraph.errors import ZgraphError


@dataclass(frozen=True)
class Outcome:
    """A row and what is predicted of it, in seconds and in bytes; or why it cannot be predicted."""

    row: Row | Unread
    time: Interval | None = None
    memory: Interval | None = None
    reason: str = ""

    @property
    def record(self) -> dict[str, Any]:
        """The row as JSON has it."""
        known = {"id": self.row.name, "system": self.row.system, "measured_s": self.row.measured_s}
        if self.time is None:
            return {**known, "reason": self.reason}
        found = {**known, "predicted_s": self.time.value, "low_s": self.time.low, "high_s": self.time.high}
        if isinstance(self.row, Row) and self.row.memory[0] and self.memory is not None:
            measured, kind = self.row.memory
            memory = {"kind": kind, "measured_bytes": measured, "predicted_bytes": self.memory.value}
            found["memory"] = {**memory, "low_bytes": self.memory.low, "high_bytes": self.memory.high}
        return found


def outcome(row: Row | Unread) -> Outcome:
    """Predict a row with the built-in profile of its device."""
    if isinstance(row, Unread):
        return Outcome(row, reason=row.reason)
    costs = costs_of(row)
    try:
        found = predicted(row, costs)
    except ZgraphError as problem:
        return Outcome(row, reason=str(problem))
    time = costs.hardware.error.time(
        found.step_s(costs),
        num_ranks=row.num_ranks,
        sequence=row.sequence,
        is_known=row.attention == "math" or row.attention in costs.hardware.device.attention,
    )
    return Outcome(row, time, memory_interval(found.peak_bytes, costs) if row.memory[0] else None)


def main(
    rows: Annotated[list[Path] | None, typer.Option(help="Files of the columns of benchmarks/data.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write what was found.")] = None,
    refit: Annotated[bool, typer.Option("--fit", help="Fit the profiles' constants to the rows.")] = False,
) -> None:
    """Print each published step beside what is predicted of it, and the mean error."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    found = [row for path in rows or FILES for row in read(path)]
    record: Any
    if refit:
        record = _refitted(console, [row for row in found if isinstance(row, Row)])
    else:
        outcomes = [outcome(row) for row in track(found, "predicting", console=Console(stderr=True))]
        _print(console, outcomes)
        record = [o.record for o in outcomes]
    if json_file is not None:
        json_file.write_text(json.dumps(record, indent=1) + "\n")


def summary(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Errors of all rows that could be predicted, and the share that their intervals cover."""
    timed = [(o.row.measured_s, o.time) for o in outcomes if o.time is not None]
    errors = [abs(time.value / measured - 1) for measured, time in timed]
    found = {"num_rows": len(outcomes), "num_predicted": len(timed)}
    if errors:
        covered = fmean(time.low <= measured <= time.high for measured, time in timed)
        found |= {"mean_error": fmean(errors), "median_error": median(errors), "covered": covered}
    for kind in ("allocated", "reserved"):
        said = [o for o in outcomes if isinstance(o.row, Row) and o.memory is not None and o.row.memory[1] == kind]
        sizes = [(o.row.memory[0], o.memory.value) for o in said if isinstance(o.row, Row) and o.memory is not None]
        if sizes:
            error = fmean(abs(predicted / measured - 1) for measured, predicted in sizes)
            found |= {f"num_{kind}": len(sizes), f"mean_{kind}_error": error}
    return found


def _print(console: Console, outcomes: Iterable[Outcome]) -> None:
    outcomes = list(outcomes)
    table = Table("row", "system", "measured s", "predicted", "error", title_justify="left")
    for found in outcomes:
        row, time = found.row, found.time
        if time is None:
            table.add_row(row.name, row.system, f"{row.measured_s:.3g}", found.reason, "", style="dim")
        else:
            error = f"{time.value / row.measured_s - 1:+.1%}"
            table.add_row(row.name, row.system, f"{row.measured_s:.4g}", time.text("s"), error)
    console.print(table)
    said = summary(outcomes)
    if "mean_error" in said:
        console.print(
            f"mean error {said['mean_error']:.1%}, median {said['median_error']:.1%} over {said['num_predicted']:.0f} "
            f"of {said['num_rows']:.0f} rows; intervals cover {said['covered']:.0%}"
        )


def _refitted(console: Console, rows: Sequence[Row]) -> dict[str, Any]:
    """Schedule all rows, and fit the profiles to them."""
    predictions = [predicted(row, costs_of(row)) for row in track(rows, "scheduling", console=Console(stderr=True))]
    return fitted(console, predictions)


def fitted(console: Console, predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Fit, say what leaving a system out says, and write the profiles."""
    constants, near = fit(predictions)
    residuals = left_out(predictions, near.solved)
    table = Table("left out", "rows", "mean error", "median", "bias", title_justify="left")
    for family in dict.fromkeys(r.family for r in residuals):
        errors = [r.error for r in residuals if r.family == family]
        sizes = [abs(e) for e in errors]
        table.add_row(family, str(len(errors)), *(f"{x:.1%}" for x in (fmean(sizes), median(sizes), fmean(errors))))
    console.print(table)
    sizes = [abs(r.error) for r in residuals]
    covered = coverage(residuals)
    console.print(f"mean {fmean(sizes):.1%}, median {median(sizes):.1%} over {len(sizes)} rows; covered {covered:.0%}")
    known = accuracy(residuals)
    store(constants, dict.fromkeys(("ampere", "hopper"), known))
    return {
        "constants": {name: round(constants[name], 4) for name in PRIORS},
        "mean_error": fmean(sizes),
        "median_error": median(sizes),
        "covered": covered,
        "bounds": [known.time_low, known.time_high],
        "rows": [
            {"id": r.row.name, "family": r.family, "measured_s": r.row.measured_s, "predicted_s": r.predicted_s}
            for r in residuals
        ],
    }


def left_out(predictions: Sequence[Prediction], solved: Any) -> list[Residual]:
    """Each row as constants say that have not seen its family; `solved` gives these by the family that is left out."""
    found = []
    for family in dict.fromkeys(p.row.family for p in predictions):
        constants = solved(family)
        found += [Residual(p.row, step_s(p, constants)) for p in predictions if p.row.family == family]
    return found


if __name__ == "__main__":
    typer.run(main)
