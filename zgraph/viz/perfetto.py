"""The predicted step as a trace that ui.perfetto.dev and chrome://tracing read.

Each lane is a thread, and what computing waits for is one more. Arrows lead from a transfer to where it is waited for.
Bytes alive are counters, by category.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from zgraph.cost import Moment, Span, Stall, Timeline
from zgraph.ir import Instruction, Node, Plan
from zgraph.viz.boxes import details

TRACKS = {
    "compute": "computing",
    "waits": "waiting for",
    "comm": "communication",
    "d2h": "copies to the host",
    "h2d": "copies from the host",
}
"""Name of each track, in their order from the top."""

NUMBERS = {row: number for number, row in enumerate(TRACKS, 1)}

Event = dict[str, Any]


def perfetto(plan: Plan, timeline: Timeline, rest_bytes: int, title: str) -> Iterator[str]:
    """One predicted step of a plan in the JSON of Chrome's trace events. Times are in microseconds."""
    return _text(_events(plan, timeline, rest_bytes, title))


def _text(events: Iterator[Event]) -> Iterator[str]:
    yield '{"displayTimeUnit": "ms", "traceEvents": [\n'
    for number, event in enumerate(events):
        yield (",\n" if number else "") + json.dumps({**event, "pid": 1})
    yield "\n]}\n"


def _events(plan: Plan, timeline: Timeline, rest_bytes: int, title: str) -> Iterator[Event]:
    yield {"ph": "M", "name": "process_name", "args": {"name": f"{title}: predicted step, each of {_ranks(plan)}"}}
    used = {span.lane for span in timeline.spans} | ({"waits"} if timeline.stalls else set())
    for row in (row for row in TRACKS if row in used):
        yield {"ph": "M", "tid": NUMBERS[row], "name": "thread_name", "args": {"name": TRACKS[row]}}
        yield {"ph": "M", "tid": NUMBERS[row], "name": "thread_sort_index", "args": {"sort_index": NUMBERS[row]}}
    yield from _Walk(plan, timeline, rest_bytes).events()


def _ranks(plan: Plan) -> str:
    count = plan.graph.num_ranks
    return f"{count} rank{'s' * (count > 1)}"


def _slice(span: Span, node: Node) -> Event:
    args = {"node": f"%{node.name}", "makes": ", ".join(str(r.type) for r in node.results), **details(node)}
    us = {"ts": _rounded(span.start_us), "dur": _rounded(span.end_us - span.start_us)}
    return {"ph": "X", "tid": NUMBERS[span.lane], **us, "name": span.op, "cat": span.phase, "args": args}


def _stall(stall: Stall, start: Node) -> Event:
    args = {"wait": f"%{stall.node}", "for": f"%{stall.start}", **details(start)}
    us = {"ts": _rounded(stall.start_us), "dur": _rounded(stall.us)}
    return {
        "ph": "X",
        "tid": NUMBERS["waits"],
        **us,
        "name": start.op,
        "cat": stall.phase,
        "cname": "terrible",
        "args": args,
    }


class _Walk:
    """Walks the program in order and yields events; one that takes no time is put where the op before it ends."""

    def __init__(self, plan: Plan, timeline: Timeline, rest_bytes: int) -> None:
        self.plan, self.timeline = plan, timeline
        self.memory = _Memory(timeline, rest_bytes)
        self.stalls = {stall.start: stall for stall in timeline.stalls}
        self.transfers: dict[str, Span] = {}
        self.arrived: list[Span] = []
        self.num_arrows = 0
        self.now = 0.0

    def events(self) -> Iterator[Event]:
        spans = deque(self.timeline.spans)
        for instruction, moment in zip(_step(self.plan), self.timeline.memory.moments, strict=True):
            node = instruction.node
            span = spans.popleft() if spans and spans[0].node == node.name else None
            if span is not None:
                yield _slice(span, node)
            if node.op == "wait":
                yield from self.waited(node.operands[0].name)
            elif span is not None and span.lane != "compute":
                self.transfers.update((r.name, span) for r in node.results)
            elif span is not None:
                self.now = span.start_us
                for transfer in self.arrived:
                    yield from self.arrow(transfer, "compute")
                self.arrived.clear()
            yield from self.memory.counted(self.now, moment)
            if span is not None and span.lane == "compute":
                self.now = span.end_us
        yield from self.memory.counted(self.timeline.step_us, Moment("", "", {}))

    def waited(self, future: str) -> Iterator[Event]:
        """A wait that holds computing is a slice; any other is seen at the op that runs next."""
        stall = self.stalls.get(future)
        if stall is None:
            self.arrived.append(self.transfers[future])
            return
        yield _stall(stall, self.plan.graph.producers[future])
        self.now = stall.start_us
        yield from self.arrow(self.transfers[future], "waits")
        self.now += stall.us

    def arrow(self, transfer: Span, row: str) -> Iterator[Event]:
        """From a transfer to the slice that begins on a row now; where that waits for it to begin, no earlier."""
        end_us = max(self.now, transfer.start_us)
        flow = {"name": "arrives", "cat": "arrives", "id": self.num_arrows}
        self.num_arrows += 1
        yield {"ph": "s", "tid": NUMBERS[transfer.lane], "ts": _rounded(transfer.start_us), **flow}
        yield {"ph": "f", "bp": "e", "tid": NUMBERS[row], "ts": _rounded(end_us), **flow}


def _step(plan: Plan) -> tuple[Instruction, ...]:
    """The instructions that the simulator runs."""
    if plan.backward is None:
        return plan.forward.instructions
    return (*plan.forward.instructions, *(plan.loss_only[0] if plan.loss_only else plan.backward).instructions)


class _Memory:
    """Counters of bytes alive, one event whenever they change."""

    def __init__(self, timeline: Timeline, rest_bytes: int) -> None:
        moments = timeline.memory.moments
        self.categories = dict.fromkeys(name for m in moments for name, size in m.bytes_by_category.items() if size)
        self.has_host = any(m.host_bytes for m in moments)
        self.rest = {"at rest": rest_bytes} if rest_bytes else {}
        self.last: dict[str, Mapping[str, int]] = {}

    def counted(self, now: float, moment: Moment) -> Iterator[Event]:
        alive = {name: moment.bytes_by_category.get(name, 0) for name in self.categories}
        counters = {"memory in bytes": {**self.rest, **alive}}
        if self.has_host:
            counters["memory of the host in bytes"] = {"alive": moment.host_bytes}
        for name, sizes in counters.items():
            if sizes != self.last.get(name):
                self.last[name] = sizes
                yield {"ph": "C", "ts": _rounded(now), "name": name, "args": sizes}


def _rounded(us: float) -> float:
    """To the nanosecond."""
    return round(us, 3)
