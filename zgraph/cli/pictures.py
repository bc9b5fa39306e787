"""The command that writes a run as a picture."""

from __future__ import annotations

import sys
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from zgraph.cli.app import AsJson, Load, app, console, errors, print_json, read_whole_run, writing
from zgraph.errors import UsageError


@app.command()
def view(
    files: Annotated[
        list[str],
        typer.Argument(help="A run file, or two to show side by side; - for standard input.", metavar="FILE..."),
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="The HTML file to write.")] = "report.html",
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    load: Load = None,
    as_json: AsJson = False,
) -> None:
    """Write one HTML file: the graph after every pass, the timeline and the memory of the predicted step.

    The file opens offline, in any browser. Of two runs it shows where they differ, with times and bytes on one scale.

    Example: `zgraph view run.zg -o report.html`
    """
    from zgraph.viz.page import page

    if show and output == "-":
        raise UsageError("--open opens a file: give --output another name than -")
    _check(files)
    runs = [read_whole_run(file) for file in files]
    with errors().status("drawing"):
        text = page(runs[0]) if len(runs) == 1 else page(runs[0], runs[1], _names(*files))
    if output == "-":
        sys.stdout.write(text)
        return
    with writing(output):
        Path(output).write_text(text, encoding="utf-8")
    if as_json:
        print_json({"output": output, "bytes": len(text)})
    else:
        graphs = " and ".join(str(len(run.names)) for run in runs)
        console().print(f"{output}: {len(text) / 2**20:,.1f} MiB, {graphs} graphs", markup=False)
    if show:
        webbrowser.open(Path(output).resolve().as_uri())


def _check(files: list[str]) -> None:
    """Raise UsageError unless these are one file or two."""
    if len(files) > 2:
        raise UsageError(f"a page shows one run or two side by side, and these are {len(files)}: leave some out")
    if len(files) == 2 and (files[0] == files[1] or Path(files[0]).resolve() == Path(files[1]).resolve()):
        raise UsageError(f"{files[0]} and {files[1]} are the same file: give one of them, or another run")


def _names(first: str, second: str) -> tuple[str, str]:
    """Titles of two files: their names, or their paths where these are alike."""
    short = Path(first).name, Path(second).name
    return short if short[0] != short[1] else (first, second)
