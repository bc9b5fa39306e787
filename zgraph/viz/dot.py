"""A graph for Graphviz: modules are clusters, lanes are colours, and every edge has its type."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile

from zgraph.ir import Graph
from zgraph.viz.boxes import Box, boxes


def dot(graph: Graph, title: str) -> Iterator[str]:
    """A graph in the DOT language."""
    found = list(boxes(graph))
    yield f"digraph {_quoted(title)} {{\nnewrank=true\n"
    yield 'node [shape=box, style="rounded,filled", fontname="Helvetica"]\nedge [fontname="Helvetica", fontsize=9]\n'
    yield from _clusters(found)
    maker = {value.name: box.name for box in found for value in box.makes}
    for box in found:
        for value in box.reads:
            yield f"{_quoted(maker[value.name])} -> {_quoted(box.name)} [label={_quoted(str(value.type))}]\n"
    yield "}\n"


def _clusters(found: list[Box]) -> Iterator[str]:
    """Boxes of one scope stand side by side, so that each cluster is opened once."""
    around: tuple[str, ...] = ()
    for box in sorted(found, key=lambda b: b.scope):
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(around, box.scope, strict=False)))
        yield "}\n" * (len(around) - shared)
        for depth in range(shared + 1, len(box.scope) + 1):
            name = _quoted("cluster_" + ".".join(box.scope[:depth]))
            yield f"subgraph {name} {{\nlabel={_quoted(box.scope[depth - 1])}\n"
        around = box.scope
        label = box.label if box.label == box.name else f"{box.label}\n%{box.name}"
        yield f"{_quoted(box.name)} [label={_quoted(label)}, fillcolor={_quoted(box.colour)}{_tooltip(box)}]\n"
    yield "}\n" * len(around)


def _tooltip(box: Box) -> str:
    source = box.details.get("source", "")
    return f", tooltip={_quoted(source)}" if source else ""


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
