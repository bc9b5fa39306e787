"""The command that fits a hardware profile to what training has recorded."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from zgraph.cli.app import AsJson, app, console, print_json, writing
from zgraph.cli.completion import hardware_names
from zgraph.cost import hardware
from zgraph.errors import UsageError


@app.command()
def calibrate(
    folders: Annotated[list[str], typer.Argument(help="Folders that zgraph.compile(model, record=FOLDER) wrote.")],
    output: Annotated[str, typer.Option("--output", "-o", help="The profile to write, as mine.toml.")] = "",
    base: Annotated[
        str,
        typer.Option(
            "--from",
            help="The profile to begin with.",
            show_default="what was planned with",
            autocompletion=hardware_names,
        ),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Fit a hardware profile to recorded training: rates, links, and error bars.

    Each run takes part with the times of its nodes. With several runs, the error bars come from predicting each by
    constants that were fitted without it.

    Example: `zgraph calibrate costs -o mine.toml`
    """
    from zgraph.estimate import calibration

    if output and Path(output).exists():
        raise UsageError(f"there is a file {output} already; give another one with -o, or remove it")
    known = hardware(base) if base else None
    with writing(output or "."):
        found = calibration.calibrate(*folders, path=output or None, base=known)
    if as_json:
        rows = [{**asdict(run), "path": str(run.path)} for run in found.runs]
        print_json(
            {
                "hardware": found.hardware.model_dump(mode="json"),
                "changes": [asdict(change) for change in found.changes],
                "runs": rows,
                "residual": found.residual,
            }
        )
        return
    console().print(found)
    if output:
        console().print(f'{output}: take it as --hardware {output}, or zgraph.compile(model, hardware="{output}")')
