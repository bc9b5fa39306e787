"""Why a node is there, and why it is where it is."""

from __future__ import annotations

import linecache
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from zgraph.compare import Line, moved, node_lines
from zgraph.cost import Timeline, simulate
from zgraph.errors import UsageError
from zgraph.ir import OPS, Graph, Node
from zgraph.passes import make_plan
from zgraph.runfile import RunFile


@dataclass(frozen=True)
class Event:
    """What a pass did to a node: made, changed, moved or removed it."""

    graph: str
    did: str
    text: str


@dataclass(frozen=True)
class Explanation:
    """All that a run knows of a node.

    Args:
        node: as it is in the last graph that has it.
        source: the user's line, with its place; empty where no line is known.
        events: what the passes did to it, in order.
        reads: the nodes or inputs that it reads from, and the op of each.
        readers: what reads it, in the order of the program.
        timing: when it runs in the predicted step and why then; empty where the graph cannot be planned yet.
    """

    node: Node
    source: str
    events: tuple[Event, ...]
    reads: tuple[str, ...]
    readers: tuple[str, ...]
    timing: tuple[str, ...]


def explain(run: RunFile, name: str) -> Explanation:
    """What is known of a node.

    Raises:
        UsageError: no graph of the run has such a node; the message has the nearest names.
    """
    wanted = name.removeprefix("%")
    lines = {member: node_lines(text) for member, text in run.texts.items()}
    with_it = [s.member for s in run.manifest.snapshots if wanted in lines[s.member]]
    if not with_it:
        near = get_close_matches(wanted, {key for some in lines.values() for key in some}, 3)
        hint = f"did you mean {', '.join(near)}?" if near else "zgraph show lists them"
        raise UsageError(f"no graph of the run has a node {name}; {hint}")
    graph = run.graph_of(with_it[-1])
    node = next(n for n, key in zip(graph.nodes, node_lines(run.texts[with_it[-1]]), strict=True) if key == wanted)
    makers = ((v.name, graph.producers.get(v.name)) for v in node.operands)
    made = {r.name for r in node.results}
    is_last = with_it[-1] == run.manifest.snapshots[-1].member
    return Explanation(
        node,
        _source(node),
        tuple(_events(run, wanted, lines)),
        tuple(f"%{value} ({maker.op if maker is not None else 'input'})" for value, maker in makers),
        tuple(f"%{n.name} ({n.op})" for n in graph.nodes if any(v.name in made for v in n.operands)),
        tuple(_timing(run, graph, node)) if is_last else (),
    )


def _source(node: Node) -> str:
    origin = node.origin
    if not origin.file:
        return ""
    line = linecache.getline(origin.file, origin.line).strip()
    return f"{origin.file}:{origin.line}" + (f"  {line}" if line else "")


def _events(run: RunFile, name: str, lines: Mapping[str, Mapping[str, Line]]) -> Iterator[Event]:
    before: Mapping[str, Line] = {}
    for graph, snapshot in zip(run.names, run.manifest.snapshots, strict=True):
        after = lines[snapshot.member]
        if after is before:
            continue
        if name in after and name not in before:
            yield Event(graph, "made" if before else "captured", after[name].text)
        elif name in before and name not in after:
            yield Event(graph, "removed", "")
        elif name in after:
            if before[name].text != after[name].text:
                yield Event(graph, "changed", after[name].text)
            if name in moved(list(before), list(after)):
                was, now = (_behind(name, some) for some in (before, after))
                yield Event(graph, "moved", f"behind {now}" + (f", from behind {was}" if was != now else ", with it"))
        before = after


def _behind(name: str, lines: Mapping[str, Line]) -> str:
    """What stands before a node."""
    last = "nothing"
    for key in lines:
        if key == name:
            return last
        last = f"%{key}" if "(" not in key else key
    return last


def _timing(run: RunFile, graph: Graph, node: Node) -> Iterator[str]:
    """When a node runs in the predicted step, and what that has to do with others."""
    timeline = simulate(make_plan(graph), run.context.costs, run.context.hints)
    span = next((s for s in timeline.spans if s.node == node.name), None)
    if span is None:
        return
    yield f"on the {span.lane} lane from {span.start_us:,.1f} to {span.end_us:,.1f} us of {timeline.step_us:,.1f}"
    if node.op in OPS and OPS[node.op].lane != "compute":
        yield from _transfer(graph, node, timeline)
    for stall in timeline.stalls:
        if stall.node == node.name:
            yield f"computing waits here {stall.us:,.1f} us for %{stall.start}"


def _transfer(graph: Graph, start: Node, timeline: Timeline) -> Iterator[str]:
    """A transfer: how long before it is needed it is over, and what that costs or saves."""
    spans = {s.node: s for s in timeline.spans}
    made = {r.name for r in start.results}
    wait = next((n for n in graph.nodes if n.op == "wait" and any(v.name in made for v in n.operands)), None)
    if wait is None:
        return
    arrived = {r.name for r in wait.results}
    user = next((n for n in graph.nodes if any(v.name in arrived for v in n.operands)), None)
    here = spans[start.name]
    later = graph.nodes[graph.nodes.index(wait) :]
    needed = next((s for n in later if (s := spans.get(n.name)) is not None and s.lane == "compute"), None)
    stall = sum(s.us for s in timeline.stalls if s.start == start.name)
    until = f"%{user.name} ({user.op})" if user is not None else "the end"
    if stall:
        yield f"{until} needs it {stall:,.1f} us before it is there: that much of it is exposed"
    elif needed is not None:
        slack = needed.start_us - here.end_us
        yield f"all of its {here.end_us - here.start_us:,.1f} us are hidden: it is there {slack:,.1f} us before {until}"
