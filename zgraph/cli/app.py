"""The commands, what they share, and what an error becomes: one line on standard error, and an exit code.

Exit codes: 0 fine, 1 something failed, 2 the command was used wrongly, 3 it does not fit the memory budget.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NoReturn

import typer
from rich.console import Console
from rich.progress import Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from typer.core import TyperGroup

from zgraph.cli.terminal import Terminal
from zgraph.errors import RecipeError, UsageError, did_you_mean, nearest
from zgraph.passes import known_passes, register_pass
from zgraph.passes.core.pipeline import parse_size
from zgraph.runfile.format import RunFile, load_run
from zgraph.version import __version__

FAILED, USED_WRONGLY, DOES_NOT_FIT = 1, 2, 3

DTYPES = ("bf16", "f16", "f32")
"""Completions that shells offer for a dtype."""

KERNELS = ("aten", "triton", "inductor", "auto")
COMPUTES = ("float8", "float8-rowwise")

FILE_WIDTH = 150
"""Columns of a table that does not go to a terminal."""


OLD_NAMES = {"report": "env", "trace-export": "export"}
"""Earlier names of commands: scripts may still use them, and no help lists them."""


class Commands(TyperGroup):
    """Commands that know what a mistyped one may have meant, and what they were called before."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        found = super().get_command(ctx, cmd_name)
        if found is None and cmd_name in OLD_NAMES:
            found = super().get_command(ctx, OLD_NAMES[cmd_name])
        if found is None and not ctx.resilient_parsing:
            known = self.list_commands(ctx)
            hint = did_you_mean(cmd_name, known, f"the commands are {', '.join(known)}")
            raise UsageError(f"there is no command {cmd_name}; {hint}")
        return found


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Look at what zgraph does to a model: trace it, run passes on it, compare, explain.",
)


def _version(is_asked: bool) -> None:
    """Print the version, and end."""
    if is_asked:
        typer.echo(f"zgraph {__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
]


@app.callback()
def _all(version: Version = False) -> None:
    """Commands that read or write files take `-` for standard input or output, and those that print, `--json`."""


def _loaded(files: list[str] | None) -> list[str] | None:
    """Register the passes that Python files define."""
    for file in files or []:
        from zgraph.cli.models import passes_of

        for name, kind in passes_of(file).items():
            known = known_passes().get(name)
            if known is not None and known.__module__ != kind.__module__:
                raise UsageError(f"{file} defines a pass called {name}, and there is one already: call it otherwise")
            try:
                register_pass(kind)
            except RecipeError as error:
                raise UsageError(f"{file}: {error}") from None
    return files


Load = Annotated[
    list[str] | None,
    typer.Option(
        callback=_loaded,
        is_eager=True,
        help="A Python file that defines passes, or allows a namespace of ops; may be given again.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def console() -> Console:
    """Where commands print: as wide as the terminal, or as tables need; without colours where NO_COLOR is set."""
    is_terminal = sys.stdout.isatty()
    return Terminal(soft_wrap=not is_terminal, width=None if is_terminal or "COLUMNS" in os.environ else FILE_WIDTH)


def errors() -> Console:
    """Where progress is shown: not in what others read."""
    return Terminal(stderr=True)


def progress(*more: ProgressColumn) -> Progress:
    """Progress on the terminal: the task and its time; nothing where no one watches."""
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), *more, TimeElapsedColumn()
    return Progress(*columns, console=errors(), transient=True, disable=not sys.stderr.isatty())


def ended_by(number: int, _: object) -> NoReturn:
    """End with the exit code of a signal, whose handler this is."""
    sys.exit(128 + number)


def print_json(found: Mapping[str, Any] | Sequence[Any]) -> None:
    """One document of JSON on standard output."""
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


def one_of(option: str, value: str, words: Sequence[str]) -> str:
    """The value of an option. Raises UsageError if it is none of these words."""
    if value not in words:
        raise UsageError(f"{option} is one of {', '.join(words)}, not {value}")
    return value


def max_bytes(size: str) -> int | None:
    """The value of --max-memory. Raises UsageError if it is no size."""
    try:
        return parse_size(size) if size else None
    except ValueError as error:
        raise UsageError(f"--max-memory: {error}") from None


def read_run(file: str, graph: str = "final") -> tuple[RunFile, str]:
    """The run that an argument `FILE` or `FILE@GRAPH` names, and its graph, or else `graph`; `-` is standard input."""
    path, name = file, graph
    if "@" in file and not Path(file).exists():
        path, _, name = file.rpartition("@")
    if path == "-":
        return load_run(io.BytesIO(sys.stdin.buffer.read())), name
    if not Path(path).exists():
        folder = Path(path).parent
        near = nearest(Path(path).name, os.listdir(folder) if folder.is_dir() else [])
        hint = f"did you mean {folder / near[0]}?" if near else "write one with zgraph trace MODEL -o run.zg"
        raise UsageError(f"there is no file {path}; {hint}")
    return load_run(Path(path)), name


def read_whole_run(file: str) -> RunFile:
    """The run of a command that looks at all of its graphs."""
    run, graph = read_run(file, "")
    if graph:
        raise UsageError(f"this looks at all graphs of the file: leave out @{graph}")
    return run


@contextmanager
def writing(target: str) -> Iterator[None]:
    """Raises UsageError if a file cannot be written."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror}") from None


def write_run(run: RunFile, output: str) -> None:
    """Save a run; `-` is standard output."""
    target: Path | BinaryIO = sys.stdout.buffer if output == "-" else Path(output)
    with writing(output):
        run.save(target)
