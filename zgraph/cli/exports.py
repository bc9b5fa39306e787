"""The command that writes graphs and predicted steps for other tools' viewers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Annotated

import typer

from zgraph.cli.app import AsJson, Load, app, console, print_json, read_run, writing
from zgraph.cli.terminal import printable
from zgraph.errors import UsageError
from zgraph.viz.dot import dot
from zgraph.viz.model_explorer import model_explorer
from zgraph.viz.perfetto import perfetto

VIEWERS = {
    "perfetto": "open it in https://ui.perfetto.dev",
    "model-explorer": "open it with model-explorer FILE",
    "dot": "draw it with dot -Tsvg FILE",
}


@app.command()
def export(
    file: Annotated[str, typer.Argument(help="FILE, or FILE@GRAPH such as run.zg@bucket; - for standard input.")],
    to_perfetto: Annotated[
        str, typer.Option("--perfetto", help="Write the predicted step, as a trace of ui.perfetto.dev.")
    ] = "",
    to_model_explorer: Annotated[
        str, typer.Option("--model-explorer", help="Write the graph, as JSON of Model Explorer.")
    ] = "",
    to_dot: Annotated[str, typer.Option("--dot", help="Write the graph, as DOT of Graphviz.")] = "",
    load: Load = None,
    as_json: AsJson = False,
) -> None:
    """Write a graph, or its predicted step, for other tools' viewers; - is standard output.

    Example: `zgraph export run.zg --perfetto step.json --model-explorer graph.json --dot graph.dot`
    """
    targets = {"perfetto": to_perfetto, "model-explorer": to_model_explorer, "dot": to_dot}
    if not any(targets.values()):
        raise UsageError("say what to write: --perfetto FILE, --model-explorer FILE or --dot FILE")
    if list(targets.values()).count("-") > 1:
        raise UsageError("only one of --perfetto, --model-explorer and --dot can be standard output")
    run, name = read_run(file)
    graph, title = run.graph(name), run.manifest.provenance.model
    writers: dict[str, Callable[[], Iterator[str]]] = {
        "perfetto": lambda: perfetto(*run.step(name), run.context.rest_bytes, title),
        "model-explorer": lambda: model_explorer(graph, title),
        "dot": lambda: dot(graph, title),
    }
    written = {kind: {"file": to, "bytes": _write(writers[kind](), to)} for kind, to in targets.items() if to}
    if "-" in targets.values():
        return
    if as_json:
        print_json(written)
        return
    for kind, found in written.items():
        console().print(f"{found['file']}: {found['bytes']:,} bytes; {VIEWERS[kind]}", markup=False, highlight=False)


def _write(pieces: Iterator[str], target: str) -> int:
    """Write a text piece by piece; how many bytes it has."""
    if target == "-":
        return sum(sys.stdout.buffer.write(printable(piece).encode()) for piece in pieces)
    with writing(target), open(target, "wb") as stream:
        return sum(stream.write(printable(piece).encode()) for piece in pieces)
