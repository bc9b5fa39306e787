"""Why a node is there, and why it is where it is."""

from __future__ import annotations

import linecache
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches

from zgraph.compare import compare, keyed
from zgraph.cost import Timeline, simulate
from zgraph.errors import UsageError
from zgraph.ir import OPS, Graph, Node, print_node
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
        UsageError: no graph of the run has such a node; the message has the nearest name.
    """
    wanted = name.removeprefix("%")
    with_it = [n for n in run.names if _named(run.graph(n), wanted) is not None]
    if not with_it:
        names = {r.name for graph in map(run.graph, run.names) for node in graph.nodes for r in node.results}
        near = get_close_matches(wanted, names, 3)
        hint = f"did you mean {', '.join(near)}?" if near else "zgraph show lists them"
        raise UsageError(f"no graph of the run has a node {name}; {hint}")
    graph = run.graph(with_it[-1])
    node = _named(graph, wanted)
    assert node is not None
    reads = [
        f"%{v.name} ({graph.producers[v.name].op if v.name in graph.producers else 'input'})" for v in node.operands
    ]
    made = {r.name for r in node.results}
    readers = [f"%{n.name} ({n.op})" for n in graph.nodes if any(v.name in made for v in n.operands)]
    timing = tuple(_timing(run, graph, node)) if run.names[-1] in with_it else ()
    return Explanation(node, _source(node), tuple(_events(run, wanted)), tuple(reads), tuple(readers), timing)


def _named(graph: Graph, name: str) -> Node | None:
    return graph.producers.get(name) or keyed(graph).get(name)


def _source(node: Node) -> str:
    origin = node.origin
    if not origin.file:
        return ""
    line = linecache.getline(origin.file, origin.line).strip()
    return f"{origin.file}:{origin.line}" + (f"  {line}" if line else "")


def _events(run: RunFile, name: str) -> Iterator[Event]:
    before = run.graph(run.names[0])
    if (first := _named(before, name)) is not None:
        yield Event(run.names[0], "captured", print_node(first))
    for graph_name in run.names[1:]:
        after = run.graph(graph_name)
        if after is before:
            continue
        old, new = _named(before, name), _named(after, name)
        if old is None and new is not None:
            yield Event(graph_name, "made", print_node(new))
        elif old is not None and new is None:
            yield Event(graph_name, "removed", "")
        elif old is not None and new is not None:
            if print_node(old, origins=False) != print_node(new, origins=False):
                yield Event(graph_name, "changed", print_node(new))
            if any(n.name == new.name for n in compare(before, after).moved):
                yield Event(
                    graph_name, "moved", f"behind {_behind(after, new)}, before it was behind {_behind(before, old)}"
                )
        before = after


def _behind(graph: Graph, node: Node) -> str:
    at = graph.nodes.index(node)
    return f"%{graph.nodes[at - 1].name}" if at else "nothing"


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
    here, needed = spans[start.name], spans.get(wait.name)
    stall = sum(s.us for s in timeline.stalls if s.start == start.name)
    until = f"%{user.name} ({user.op})" if user is not None else "the end"
    if stall:
        yield f"{until} needs it {stall:,.1f} us before it is there: that much of it is exposed"
    elif needed is not None:
        slack = needed.start_us - here.end_us
        yield f"all of its {here.end_us - here.start_us:,.1f} us are hidden: it is there {slack:,.1f} us before {until}"
