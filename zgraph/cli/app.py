"""The commands, what they share, and what an error becomes: one line on standard error, and an exit code.

Exit codes: 0 fine, 1 something failed, 2 the command was used wrongly, 3 it does not fit the memory budget.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NoReturn

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from typer.core import TyperGroup

from zgraph.errors import BudgetError, RecipeError, UsageError, ZgraphError
from zgraph.runfile import RunFile, load_run

FAILED, USED_WRONGLY, DOES_NOT_FIT = 1, 2, 3

FILE_WIDTH = 150
"""Columns of a table that does not go to a terminal."""


class Commands(TyperGroup):
    """Commands that know what a mistyped one may have meant."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        found = super().get_command(ctx, cmd_name)
        if found is None and not ctx.resilient_parsing:
            known = self.list_commands(ctx)
            near = get_close_matches(cmd_name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(known)}"
            raise UsageError(f"there is no command {cmd_name}; {hint}")
        return found


app = typer.Typer(
    cls=Commands, no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False,
    help="Look at what zgraph does to a model: trace it, run passes on it, compare, explain.",
)  # fmt: skip


@app.callback()
def _all() -> None:
    """Commands that read or write files take `-` for standard input or output, and those that print, `--json`."""


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def console() -> Console:
    """Where commands print: as wide as the terminal, or as tables need; without colours where NO_COLOR is set."""
    is_terminal = sys.stdout.isatty()
    return Console(soft_wrap=not is_terminal, width=None if is_terminal or "COLUMNS" in os.environ else FILE_WIDTH)


def errors() -> Console:
    """Where progress is shown: not in what others read."""
    return Console(stderr=True)


def progress() -> Progress:
    """What is being done, and for how long."""
    return Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=errors(), transient=True
    )


def print_json(found: Mapping[str, Any] | Sequence[Any]) -> None:
    """One document of JSON on standard output."""
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


def read_run(file: str) -> tuple[RunFile, str]:
    """The run that an argument `FILE` or `FILE@GRAPH` names, and the graph of it; `-` is standard input."""
    path, _, name = file.rpartition("@") if "@" in file else (file, "", "final")
    if path == "-":
        return load_run(io.BytesIO(sys.stdin.buffer.read())), name
    if not Path(path).exists():
        folder = Path(path).parent
        near = get_close_matches(Path(path).name, os.listdir(folder) if folder.is_dir() else [], 1)
        hint = f"did you mean {folder / near[0]}?" if near else "write one with zgraph trace MODEL -o run.zg"
        raise UsageError(f"there is no file {path}; {hint}")
    return load_run(Path(path)), name


def write_run(run: RunFile, output: str) -> None:
    """Save a run; `-` is standard output."""
    target: Path | BinaryIO = sys.stdout.buffer if output == "-" else Path(output)
    run.save(target)


def load_commands() -> None:
    """Import the modules that add commands."""
    from zgraph.cli import commands, debugging, exports, machine, pictures, planning  # noqa: F401


def main() -> NoReturn:
    """Run the command; a ZgraphError is one line on standard error."""
    load_commands()
    try:
        app(prog_name="zgraph")
    except ZgraphError as error:
        sys.stderr.write(f"zgraph: {error}\n")
        wrongly = isinstance(error, UsageError | RecipeError)
        sys.exit(DOES_NOT_FIT if isinstance(error, BudgetError) else USED_WRONGLY if wrongly else FAILED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read has read enough
    sys.exit(0)
