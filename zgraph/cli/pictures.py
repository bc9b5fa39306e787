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
    file: Annotated[str, typer.Argument(help="A run file; - for standard input.")],
    output: Annotated[str, typer.Option("--output", "-o", help="The HTML file to write.")] = "report.html",
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    load: Load = None,
    as_json: AsJson = False,
) -> None:
    """Write one HTML file: the graph after every pass, the timeline and the memory of the predicted step.

    The file opens offline, in any browser.

    Example: `zgraph view run.zg -o report.html`
    """
    from zgraph.viz.page import page

    if show and output == "-":
        raise UsageError("--open opens a file: give --output another name than -")
    run = read_whole_run(file)
    with errors().status("drawing"):
        text = page(run)
    if output == "-":
        sys.stdout.write(text)
        return
    with writing(output):
        Path(output).write_text(text, encoding="utf-8")
    if as_json:
        print_json({"output": output, "bytes": len(text)})
    else:
        console().print(f"{output}: {len(text) / 2**20:,.1f} MiB, {len(run.names)} graphs", markup=False)
    if show:
        webbrowser.open(Path(output).resolve().as_uri())
