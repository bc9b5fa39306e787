"""The command `env`: a description of the machine at hand."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from zgraph.cli.app import AsJson, app, console, print_json
from zgraph.cli.environment_report import bug_report
from zgraph.viz import gibibytes


@app.command()
def env(as_json: AsJson = False) -> None:
    """Describe this machine for a bug report; nothing secret is in it.

    Example: `zgraph env`
    """
    found = bug_report()
    if as_json:
        print_json(found)
        return
    table = Table.grid(padding=(0, 2))
    for title, section in found.items():
        for number, (name, value) in enumerate(section.items()):
            table.add_row("" if number else title, escape(name.removesuffix("_bytes")), escape(_shown(name, value)))
    console().print(table, highlight=False)


def _shown(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return f"{gibibytes(value['bytes'])} in {value['files']:,} files"
    if isinstance(value, list):
        return "\n".join(value) if name == "GPUs" and value else ", ".join(value) or "none"
    if name.endswith("_bytes") and value is not None:
        return gibibytes(value)
    return "unknown" if value is None else str(value)
