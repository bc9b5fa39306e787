"""The command, and its tables."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.errors import BenchmarkError
from benchmarks.lease.driver import Lease, ending_children
from benchmarks.lease.parts import LIMIT_S, PARTS, Part, named
from benchmarks.lease.results import FILE, Result

WORDS = {True: "[green]passed[/]", False: "[bold red]FAILED[/]", None: ""}


def main(
    out: Annotated[Path, typer.Option(help="Folder for results.jsonl, logs, traces and caches.")],
    only: Annotated[list[str] | None, typer.Option(help="A part; may repeat. In the usual order.")] = None,
    small: Annotated[bool, typer.Option("--small", help="Tiny sizes, to try the parts.")] = False,
    limit: Annotated[float, typer.Option(min=10, help="Seconds of all parts; the last are left out.")] = LIMIT_S,
) -> None:
    """Run the parts, print a table for each, and exit with 1 if a check failed."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        wanted = {named(name).name for name in only or ()}
        parts = tuple(part for part in PARTS if not wanted or part.name in wanted)
        with ending_children():
            found = Lease(out, parts, limit, small).run(lambda part, more: console.print(table(part, more)))
    except BenchmarkError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(1) from error
    last = found[-1]
    console.print(
        f"{last.more['num_passed']} passed, {last.value} failed, {last.more['num_figures']} figures in "
        f"{last.seconds:.0f} s; all of them are in {out / FILE}",
        highlight=False,
    )
    raise typer.Exit(0 if last.ok else 1)


def table(part: Part, found: list[Result]) -> Table:
    """The results of a part."""
    made = Table(title=f"{part.name}: {part.proves}", title_justify="left")
    made.add_column("result")
    made.add_column("value", justify="right")
    made.add_column("")
    made.add_column("s", justify="right")
    made.add_column("why", overflow="fold")
    for result in found:
        rank = f" (rank {result.more['rank']})" if "rank" in result.more else ""
        why = str(result.more.get("error") or result.more.get("note") or "")
        made.add_row(
            result.name + rank, _value(result.value, result.unit), WORDS[result.ok], f"{result.seconds:.1f}", why
        )
    return made


def _value(value: Any, unit: str) -> str:
    shown = f"{value:,.4g}" if isinstance(value, float) else "" if value is None else str(value)
    return f"{shown} {unit}".strip()


def run() -> None:
    """The command line."""
    typer.run(main)
