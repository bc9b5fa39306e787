"""A run, or two side by side, as one HTML file that needs nothing else: the graph after every pass, the timeline and
the memory of the step.

A run's data lies in the file as JSON, compressed; the scripts in `html/` read it and draw. Nodes are numbered once
for all graphs: a graph is the order of its nodes' numbers, and a node has a text for each graph in which it changed.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from itertools import pairwise
from typing import Any

from zgraph.cost.memory import lifetimes
from zgraph.ir import OPS, Mesh
from zgraph.ir.lines import Line, node_lines, read_line
from zgraph.passes import make_plan
from zgraph.passes.schedule import step_bound_us
from zgraph.runfile.format import RunFile
from zgraph.runfile.sources import context_of
from zgraph.viz.headline import figures, headline

SCRIPTS = (
    "run.js",
    "tree.js",
    "gestures.js",
    "graph.js",
    "program.js",
    "charts.js",
    "timeline.js",
    "memory.js",
    "details.js",
    "app.js",
    "search.js",
    "beside.js",
    "link.js",
    "pictures.js",
    "main.js",
)


def page(run: RunFile, beside: RunFile | None = None, names: tuple[str, str] = ("first", "second")) -> str:
    """The text of the HTML file for a run, or for two.

    It opens offline, asks no network for anything, and shows texts of the run as text only, whatever they hold.

    Args:
        run: the graphs and what the passes knew.
        beside: a run to show beside it, with the figures in which they differ.
        names: what the two are called.
    """
    runs = (
        [_data(run)] if beside is None else [{**_data(r), "name": n} for r, n in zip((run, beside), names, strict=True)]
    )
    packed = gzip.compress(json.dumps(runs, separators=(",", ":")).encode(), mtime=0)
    folder = files(__package__) / "html"
    scripts = "\n".join((folder / name).read_text() for name in SCRIPTS)
    parts = {
        "title": html.escape(f"{' and '.join(dict.fromkeys(r['model'] for r in runs))}, zgraph"),
        "style": (folder / "style.css").read_text(),
        "data": base64.b64encode(packed).decode(),
        "script": scripts,
    }
    template = (folder / "report.html").read_text()
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _data(run: RunFile) -> dict[str, Any]:
    context, provenance = run.context, run.manifest.provenance
    table = _Nodes(run)
    found = figures(run)
    return {
        "headline": headline(run),
        "figures": found and asdict(found),
        "opening": _opening(table.num_changed),
        "model": provenance.model,
        "ranks": _ranks(context.mesh),
        "hardware": context.costs.hardware.name,
        "made": f"{provenance.made:%Y-%m-%d %H:%M} UTC, zgraph {provenance.zgraph}, torch {provenance.torch}",
        "budget": context.memory_budget,
        "rest": context.rest_bytes,
        "graphs": [
            {"name": name, "step": s.step, "seconds": s.seconds}
            for name, s in zip(run.names, run.manifest.snapshots, strict=True)
        ],
        "orders": table.orders,
        "nodes": table.columns,
        "kinds": {op.name: op.kind for op in OPS.values()},
        "texts": table.texts,
        "sources": context_of(run.sources, zip(table.columns["file"], table.columns["line"], strict=True)),
        **_step(run, table.numbers),
    }


def _opening(num_changed: Sequence[int]) -> int:
    """Position of the graph that a report opens at: the one whose pass changed most of the graph before it.

    What counts are the nodes that a pass added, removed or changed. A node counts as changed if its op or what it reads
    did; what only says more of it does not count, such as its placement, which `partition` writes to all nodes, and
    neither does its place in the order. Nothing is before what was captured, so that it counts for nothing. Of passes
    that changed as much the first is taken; where none changed anything, the last graph.
    """
    most = max(num_changed)
    return num_changed.index(most) if most else len(num_changed) - 1


def _ranks(mesh: Mesh) -> str:
    return " x ".join(str(axis.size) for axis in mesh) or "1"


class _Nodes:
    """Every node of every graph of a run, numbered as they come, and the graphs as orders of numbers.

    An order is written as the differences between neighbours, most of which are 1; None is the order before.
    `num_changed` says of each graph how many nodes its pass added, removed or changed.
    """

    def __init__(self, run: RunFile) -> None:
        self.numbers: dict[str, int] = {}
        self.columns: dict[str, list[Any]] = {n: [] for n in ("key", "phase", "module", "file", "line", "by")}
        self.texts: list[tuple[int, int, str]] = []
        self.orders: list[list[int] | None] = []
        self.num_changed: list[int] = []
        self.latest: list[Line] = []
        before, there = "", set[int]()
        latest: list[str] = []
        for graph, snapshot in enumerate(run.manifest.snapshots):
            if snapshot.member == before:
                self.orders.append(None)
                self.num_changed.append(0)
                continue
            before = snapshot.member
            order, num_changed = [0], 0
            for key, line in node_lines(run.texts[before]).items():
                number = self.numbers.setdefault(key, len(latest))
                if number == len(latest):
                    latest.append(line)
                    self.add(key, line, graph)
                elif latest[number] != line:
                    num_changed += self.rewrite(number, line, graph) and number in there
                latest[number] = line
                order.append(number)
            self.orders.append([b - a for a, b in pairwise(order)])
            self.num_changed.append((num_changed + len(there ^ set(order[1:]))) if graph else 0)
            there = set(order[1:])

    def rewrite(self, number: int, line: str, graph: int) -> bool:
        """Note a node's new text, if it has one; whether its op or what it reads changed."""
        old = self.latest[number]
        new = read_line(line, old.key)
        if new.text != old.text:
            self.latest[number] = new
            self.texts.append((number, graph, new.text))
        return (new.op, new.args) != (old.op, old.args)

    def add(self, key: str, line: str, graph: int) -> None:
        read = read_line(line, key)
        self.latest.append(read)
        self.texts.append((len(self.latest) - 1, graph, read.text))
        origin = read.origin
        values = (key, line[:3], origin.module, origin.file, origin.line, origin.made_by)
        for column, value in zip(self.columns.values(), values, strict=True):
            column.append(value)


def _step(run: RunFile, numbers: Mapping[str, int]) -> dict[str, Any]:
    """The predicted step: nodes by their numbers, -1 for those that have none, times in us."""
    context, timeline = run.context, run.timeline
    if timeline is None:
        return {"step": None, "why": f"the graph after {run.names[-1]} is not one that can be run yet"}
    graph = run.graph()
    plan = make_plan(graph, only_step=True)
    makers = {r.name: numbers[n.name] for n in graph.nodes for r in n.results}
    categories = list(dict.fromkeys(c for m in timeline.memory.moments for c in m.bytes_by_category))
    moments = timeline.memory.moments
    return {
        "step": {
            "us": timeline.step_us,
            "bound": step_bound_us(graph, context, timeline),
            "exposed": timeline.exposed_us,
            "busy": dict(timeline.busy_us),
            "spans": _columns(
                (s.lane, numbers.get(s.node, -1), _rounded(s.start_us), _rounded(s.end_us - s.start_us))
                for s in timeline.spans
            ),
            "stalls": _columns(
                (numbers.get(s.node, -1), numbers.get(s.start, -1), _rounded(s.start_us), _rounded(s.us))
                for s in timeline.stalls
            ),
        },
        "memory": {
            "categories": categories,
            "node": [numbers.get(m.node, -1) for m in moments],
            "us": [_rounded(us) for us in timeline.instants_us],
            "bytes": [[m.bytes_by_category.get(c, 0) for m in moments] for c in categories],
            "lives": _columns(
                (
                    life.name,
                    makers.get(life.name.partition("#")[0], -1),
                    life.category,
                    life.num_bytes,
                    life.born,
                    life.freed,
                )
                for life in lifetimes(plan, context.hints)
            ),
        },
    }


def _columns(rows: Iterable[Sequence[Any]]) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)]


def _rounded(us: float) -> float:
    return round(us, 3)
