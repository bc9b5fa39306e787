"""The command that says why a node is there, or why a parameter lies where it does."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from zgraph.cli.app import AsJson, Load, app, console, print_json, read_whole_run
from zgraph.runfile.explain import explain
from zgraph.runfile.weights import Weight, explain_weight


@app.command(name="explain")
def explain_node(
    file: Annotated[str, typer.Argument(help="A run file; - for standard input.")],
    node: Annotated[str, typer.Argument(help="What a node makes, such as %mm_3; or a parameter by its name.")],
    load: Load = None,
    as_json: AsJson = False,
) -> None:
    """Where a node comes from, which passes made, changed or moved it, and why it is where it is.

    Of a parameter: where it lies, why, and what the next best place would cost.

    Example: `zgraph explain run.zg %mm_3`
    """
    run = read_whole_run(file)
    if (weight := explain_weight(run, node)) is not None:
        _print_weight(weight, as_json)
        return
    found = explain(run, node)
    if as_json:
        print_json(
            {
                "node": found.node.text + found.node.end,
                "module": found.node.origin.module,
                "source": found.source,
                "events": [dataclasses.asdict(e) for e in found.events],
                "reads": found.reads,
                "readers": found.readers,
                "timing": found.timing,
            }
        )
        return
    rows = [
        ("node", found.node.text),
        ("module", found.node.origin.module),
        ("source", found.source),
    ]
    rows += [(f"{e.did} by {e.graph}" if e.did != "captured" else "captured", e.text) for e in found.events]
    rows += [("reads", ", ".join(found.reads)), ("read by", ", ".join(found.readers))]
    rows += [("when", text) for text in found.timing]
    table = Table.grid(padding=(0, 2))
    for title, text in rows:
        if text or title.startswith("removed"):
            table.add_row(title, escape(_shortened(text)))
    console().print(table, highlight=False)


MAX_CHARACTERS = 320


def _shortened(text: str) -> str:
    """The beginning of a long text: a bucket's gather reads a hundred values."""
    rest = len(text) - MAX_CHARACTERS
    return text if rest < MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} ... ({rest:,} characters more; --json has all)"


def _print_weight(weight: Weight, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "parameter": weight.entry.target,
                "at_rest": weight.at_rest,
                "reasons": weight.reasons,
                "alternatives": [{"place": str(a.place), "more_us": a.more_us} for a in weight.alternatives],
            }
        )
        return
    table = Table.grid(padding=(0, 2))
    rows = [("parameter", weight.entry.target), ("at rest", weight.at_rest), *(("lies", r) for r in weight.reasons)]
    for title, text in rows:
        table.add_row(title, escape(text))
    console().print(table, highlight=False)
