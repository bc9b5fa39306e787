"""Why a node is there, and why it is where it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from zgraph.cost import Timeline
from zgraph.errors import UsageError, did_you_mean
from zgraph.ir.lines import Line, node_lines, read_line
from zgraph.runfile.diff import moved
from zgraph.runfile.format import RunFile
from zgraph.runfile.sources import line_of

Lines = Mapping[str, str]
"""The lines of a graph's nodes, by what each is known by."""


@dataclass(frozen=True)
class Event:
    """Effect of a pass on a node: made, changed, moved or removed it."""

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

    node: Line
    source: str
    events: tuple[Event, ...]
    reads: tuple[str, ...]
    readers: tuple[str, ...]
    timing: tuple[str, ...]


def explain(run: RunFile, name: str) -> Explanation:
    """Collect all that a run tells of a node.

    Raises:
        UsageError: no graph of the run has such a node; the message has the nearest names.
        RunFileError: the timeline in the file is damaged.
    """
    wanted = name.removeprefix("%")
    graphs = {member: node_lines(text) for member, text in run.texts.items()}
    with_it = [s.member for s in run.manifest.snapshots if wanted in graphs[s.member]]
    if not with_it:
        keys = dict.fromkeys(key for lines in graphs.values() for key in lines)
        hint = did_you_mean(wanted, keys, "zgraph show lists them", most=3)
        raise UsageError(f"no graph of the run has a node {name}; {hint}")
    lines = graphs[with_it[-1]]
    node = read_line(lines[wanted])
    is_last = with_it[-1] == run.manifest.snapshots[-1].member
    return Explanation(
        node,
        _source(run, node),
        tuple(_events(run, wanted, graphs)),
        tuple(_reads(node, lines)),
        tuple(f"%{reader.name} ({reader.op})" for reader in _readers(node, lines)),
        tuple(_timing(run.timeline, node, lines)) if is_last and run.timeline is not None else (),
    )


def _source(run: RunFile, node: Line) -> str:
    origin = node.origin
    if not origin.file:
        return ""
    line = line_of(run.sources, origin)
    return origin.place + (f"  {line}" if line else "")


def _events(run: RunFile, name: str, graphs: Mapping[str, Lines]) -> Iterator[Event]:
    before: Lines = {}
    for graph, snapshot in zip(run.names, run.manifest.snapshots, strict=True):
        after = graphs[snapshot.member]
        if after is before:
            continue
        text = read_line(after[name]).text if name in after else ""
        if name in after and name not in before:
            yield Event(graph, "made" if before else "captured", text)
        elif name in before and name not in after:
            yield Event(graph, "removed", "")
        elif name in after:
            if read_line(before[name]).text != text:
                yield Event(graph, "changed", text)
            if name in moved(list(before), list(after)):
                was, now = (_behind(name, some) for some in (before, after))
                yield Event(graph, "moved", f"behind {now}" + (f", from behind {was}" if was != now else ", with it"))
        before = after


def _behind(name: str, lines: Lines) -> str:
    """The key before a node in the text, or "nothing" if it is the first."""
    last = "nothing"
    for key in lines:
        if key == name:
            return last
        last = f"%{key}" if "(" not in key else key
    return last


def _reads(node: Line, lines: Lines) -> Iterator[str]:
    """The values that a node reads, each with the op that makes it."""
    wanted = set(node.reads)
    makers: dict[str, str] = {}
    for key, line in lines.items():
        made = read_line(line).makes if ", %" in line.partition(" = ")[0] else (key,)
        makers.update(dict.fromkeys(wanted.intersection(made), line))
    for name in node.reads:
        yield f"%{name} ({read_line(makers[name]).op if name in makers else 'input'})"


def _readers(node: Line, lines: Lines) -> list[Line]:
    """The nodes that read what a node makes, in order."""
    made = node.makes
    close = [read_line(line) for line in lines.values() if any(f"%{name}" in line for name in made)]
    return [line for line in close if not set(made).isdisjoint(line.reads)]


def _timing(timeline: Timeline, node: Line, lines: Lines) -> Iterator[str]:
    """When a node runs in the predicted step, and what that has to do with others."""
    span = next((s for s in timeline.spans if s.node == node.name), None)
    if span is None:
        return
    yield f"on the {span.lane} lane from {span.start_us:,.1f} to {span.end_us:,.1f} us of {timeline.step_us:,.1f}"
    if node.lane != "compute":
        yield from _transfer(timeline, node, lines)
    for stall in timeline.stalls:
        if stall.node == node.name:
            yield f"computing waits here {stall.us:,.1f} us for %{stall.start}"


def _transfer(timeline: Timeline, start: Line, lines: Lines) -> Iterator[str]:
    """A transfer: how long before it is needed it is over, and what that costs or saves."""
    spans = {s.node: s for s in timeline.spans}
    wait = next((line for line in _readers(start, lines) if line.op == "wait"), None)
    if wait is None:
        return
    user = next(iter(_readers(wait, lines)), None)
    here = spans[start.name]
    later = islice(lines, list(lines).index(wait.key), None)
    needed = next((s for key in later if (s := spans.get(key)) is not None and s.lane == "compute"), None)
    stall = sum(s.us for s in timeline.stalls if s.start == here.node)
    until = f"%{user.name} ({user.op})" if user is not None else "the end"
    if stall:
        yield f"{until} needs it {stall:,.1f} us before it is there: that much of it is exposed"
    elif needed is not None:
        slack = needed.start_us - here.end_us
        yield f"all of its {here.end_us - here.start_us:,.1f} us are hidden: it is there {slack:,.1f} us before {until}"
