"""Place starts and waits so that communication hides behind computing, within the memory there is.

    fwd %a_start = all_gather_start(%a)            fwd %a_start = all_gather_start(%a)
    fwd %a_full = wait(%a_start)                   fwd %b_start = all_gather_start(%b)
    fwd %y = aten.mm.default(%x, %a_full)    ->    fwd %a_full = wait(%a_start)
    fwd %b_start = all_gather_start(%b)            fwd %y = aten.mm.default(%x, %a_full)
    fwd %b_full = wait(%b_start)                   fwd %b_full = wait(%b_start)

The costs of ops and collectives come with the context. For a given order of the collectives the placement is exact
(`analysis/timetable.py`), and a search tries other orders.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from heapq import nlargest
from typing import ClassVar

from zgraph.cost import MemoryCurve, Timeline
from zgraph.cost.memory import local_bytes
from zgraph.ir import OPS, Graph, Node, Phase, Value
from zgraph.ir.aliases import Memory
from zgraph.ir.ops import is_copied, moved_bytes, padded_bytes
from zgraph.ir.ops import transfer as transfer_of
from zgraph.passes.analysis.order import dependencies, reorder
from zgraph.passes.analysis.timetable import Problem, Timetable, Transfer, delayed, run, search
from zgraph.passes.core.base import Context, Pass
from zgraph.passes.plan.make_plan import OPTIMIZERS_STEP, memory_of, over_budget

BEFORE_STARTS, AFTER_STARTS = 0.95, 0.45
"""Where a wait goes before an op: after what starts there, unless its memory is needed."""

NUM_ROUNDS = 4
"""How often the search begins anew, with the waits that memory forced on the last result; and with less room where the
result does not fit the budget after all."""


@dataclass(frozen=True)
class Schedule(Pass):
    """Place starts and waits so that communication hides behind computing, within the memory there is.

    Without a memory budget, collectives may hold what the step's peak leaves free at other times, and `num_ahead` of
    the largest of them on top of the peak.

    Args:
        num_ahead: as above.
        slack: a collective starts this many of its durations before the clock says it must, and a reduction is
            waited for as many after the clock says that it is over. Clocks are wrong.
        effort: how many orders of the collectives are tried beyond the two plain ones.
    """

    num_ahead: int = 2
    slack: float = 4.0
    effort: int = 200

    name: ClassVar[str] = "schedule"
    requires: ClassVar[frozenset[str]] = frozenset({"lowered"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"laid out"})

    def __post_init__(self) -> None:
        if self.num_ahead < 0 or self.effort < 0 or not 0 <= self.slack < float("inf"):
            raise ValueError("num_ahead, slack and effort must be 0 or more")

    def run(self, graph: Graph, context: Context) -> Graph:
        step = LoweredStep(graph, context)
        if not step.collectives:
            step.headroom(0)  # raises where the budget does not hold
            return graph
        headroom = step.headroom(self.num_ahead)
        for _ in range(NUM_ROUNDS):
            placed = self._best(step, step.problem(headroom))
            over_bytes = step.over_bytes(placed)
            if over_bytes <= 0:
                return placed
            headroom = tuple(max(r - over_bytes, 0) for r in headroom)
        return step.plain[0]

    def _best(self, step: LoweredStep, problem: Problem) -> Graph:
        """The graph by the best timetable found."""
        best: tuple[Timetable, dict[int, float]] | None = None
        for _ in range(NUM_ROUNDS):
            found = search(problem, self.effort)
            sooner, timetable, waits = step.waits(problem, delayed(problem, found, self.slack), self.slack)
            if best is None or timetable.makespan_us < best[0].makespan_us:
                best = timetable, waits
            if sooner == problem:
                break
            problem = sooner
        assert best is not None, "there was a round"
        return step.placed(*best)


@dataclass(frozen=True)
class Collective:
    """A start (of a collective or a copy) with the nodes that only prepare it and those that only take its result
    apart, as positions."""

    start: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    is_gather: bool


class LoweredStep:
    """A lowered graph as a scheduling problem: ops of the compute lane in their order, collectives and copies between
    them."""

    def __init__(self, graph: Graph, context: Context) -> None:
        self.graph, self.context = graph, context
        self.collectives = _collectives(graph)
        moving = {p for c in self.collectives for p in (c.start, *c.before, *c.after)}
        self.ops = [p for p, node in enumerate(graph.nodes) if p not in moving and node.op != "pending"]
        self.op_at = {p: i for i, p in enumerate(self.ops)}
        self.phase_end = {phase: sum(graph.nodes[p].phase.rank <= phase.rank for p in self.ops) for phase in Phase}
        self.transfers = [self._transfer(c, needs) for c, needs in zip(self.collectives, self._needs(), strict=True)]

    def problem(self, headroom: tuple[int, ...]) -> Problem:
        """The problem with this headroom beside each op."""
        hints, costs = self.context.hints, self.context.costs
        us = [costs.node_us(self.graph, self.graph.nodes[p], hints) for p in self.ops]
        for collective, transfer in zip(self.collectives, self.transfers, strict=True):
            at = min(transfer.due if collective.is_gather else transfer.first, len(us) - 1)
            extra = (*collective.before, *collective.after)
            us[at] += sum(costs.node_us(self.graph, self.graph.nodes[p], hints) for p in extra)
            us[at] += costs.start_us(self.graph.nodes[collective.start], hints)
        return Problem(tuple(us), headroom, tuple(self.transfers))

    def headroom(self, num_ahead: int) -> tuple[int, ...]:
        """Bytes that collectives may hold beside each op, where all run exactly when they are needed.

        Raises:
            BudgetError: even so the step does not fit the budget.
        """
        _, curve = self.plain
        limit = self.context.step_bytes
        peak, update = curve.peak, self.context.update_bytes
        if limit is not None and max(peak.total_bytes, update) > limit:
            where = f"%{peak.node}, {peak.phase}" if peak.total_bytes >= update else OPTIMIZERS_STEP
            raise over_budget(self.context, max(peak.total_bytes, update), where)
        return self.headroom_beside(curve, num_ahead)

    def headroom_beside(self, curve: MemoryCurve, num_ahead: int) -> tuple[int, ...]:
        """Bytes that collectives may hold beside each op, of which this is the memory with none under way."""
        number = {(self.graph.nodes[p].phase.value, self.graph.nodes[p].name): i for i, p in enumerate(self.ops)}
        used = [0] * len(self.ops)
        at = most = 0
        for moment in curve.moments:  # what is moved between two ops counts for both
            here = number.get((moment.phase, moment.node))
            most = max(most, moment.total_bytes)
            if here is not None:
                used[at], used[here] = max(used[at], most), max(used[here], most)
                at, most = here, moment.total_bytes
        if used:
            used[at] = max(used[at], most)
        limit = self.context.step_bytes
        if limit is None:
            limit = curve.peak.total_bytes + self.ahead_bytes(num_ahead)
        return tuple(max(limit - u, 0) for u in used)

    def over_bytes(self, placed: Graph) -> int:
        """By how much a scheduled graph is over the budget. What is moved between two ops is not all in the rooms."""
        limit = self.context.step_bytes
        return 0 if limit is None else memory_of(placed, self.context.hints).peak.total_bytes - limit

    @cached_property
    def plain(self) -> tuple[Graph, MemoryCurve]:
        """The graph with every collective where it is needed, and its memory; as it came where only that fits."""
        limit, found = self.context.step_bytes, self.canonical()
        curve = memory_of(found, self.context.hints)
        if limit is not None and curve.peak.total_bytes > limit:
            as_it_came = memory_of(self.graph, self.context.hints)
            if as_it_came.peak.total_bytes < curve.peak.total_bytes:
                return self.graph, as_it_came
        return found, curve

    def ahead_bytes(self, num_ahead: int) -> int:
        """Bytes that the largest `num_ahead` of the collectives hold."""
        return sum(nlargest(num_ahead, (t.num_bytes for t in self.transfers)))

    def uses(self, name: str) -> tuple[int, int]:
        """The first and the last op that touch the memory in which the value called `name` was delivered."""
        (root,) = self._memory.roots(name)
        return self._uses[root]

    def is_read(self, name: str) -> bool:
        """Whether an op touches that memory; what is gathered along a second axis is read by its collective alone."""
        return not self._memory.roots(name).isdisjoint(self._uses)

    @cached_property
    def _memory(self) -> Memory:
        return Memory(self.graph)

    @cached_property
    def _uses(self) -> dict[str, tuple[int, int]]:
        found: dict[str, tuple[int, int]] = {}
        for number, position in enumerate(self.ops):
            node = self.graph.nodes[position]
            for value in node.operands if node.op != "release" else ():
                for root in self._memory.roots(value.name):
                    found[root] = (found.get(root, (number, number))[0], number)
        return found

    def canonical(self) -> Graph:
        """Every gather where it is used, and every reduction waited for at once."""
        problem = Problem((0.0,) * len(self.ops), (0,) * len(self.ops), tuple(self.transfers))
        starts = [t.due if c.is_gather else t.first for c, t in zip(self.collectives, self.transfers, strict=True)]
        order = sorted(range(len(starts)), key=lambda n: (starts[n], self.collectives[n].start))
        waits = {n: starts[n] - AFTER_STARTS for n, c in enumerate(self.collectives) if not c.is_gather}
        return self.placed(run(problem, order, starts), waits)

    def waits(self, problem: Problem, found: Timetable, slack: float) -> tuple[Problem, Timetable, dict[int, float]]:
        """For each reduction the op before which it is waited for: when it is over, or earlier if its memory is needed.

        Returns:
            The problem, where the reductions whose memory is needed are due then; the timetable with these waits; and
            the waits.
        """
        waits: dict[int, int] = {}
        held = [0] * (problem.num_ops + 1)
        for number, transfer in enumerate(problem.transfers):
            until = transfer.due
            if not self.collectives[number].is_gather:
                over_us = found.begins_us[number] + (1 + slack) * transfer.us
                until = waits[number] = max(min(bisect_left(found.ops_us, over_us), until), found.starts[number])
            held[transfer.first if transfer.frees else found.starts[number]] += transfer.num_bytes
            held[until] -= transfer.num_bytes
        first_out = sorted(waits, key=lambda n: (waits[n], n))
        used, transfers = 0, list(problem.transfers)
        for op in range(problem.num_ops):
            used += held[op]
            for number in first_out:
                if used <= problem.headroom[op]:
                    break
                if found.starts[number] <= op < waits[number]:
                    held[waits[number]] += transfers[number].num_bytes
                    used -= transfers[number].num_bytes
                    waits[number] = op
                    transfers[number] = replace(transfers[number], due=op)
        sooner = replace(problem, transfers=tuple(transfers))
        usual = [t.due for t in self.transfers]
        places = {n: op - (BEFORE_STARTS if transfers[n].due < usual[n] else AFTER_STARTS) for n, op in waits.items()}
        return sooner, run(sooner, found.order, found.starts), places

    def placed(self, timetable: Timetable, waits: Mapping[int, float]) -> Graph:
        """The graph with every start and wait where the timetable has it.

        Args:
            timetable: for each collective the op before which it starts.
            waits: for reductions, where they are waited for, among the ops' numbers.
        """
        priority: dict[int, float] = {}
        last = 0.0
        for number, position in enumerate(self.ops):
            is_release = self.graph.nodes[position].op == "release"
            last = last if is_release else float(number)
            priority[position] = last + 0.05 * is_release  # memory is free before anything starts
        step = 0.4 / (1 + len(self.collectives))
        for rank, number in enumerate(timetable.order):
            collective = self.collectives[number]
            at = timetable.starts[number] - 0.9 + rank * step
            priority.update(dict.fromkeys((*collective.before, collective.start), at))
            until = self.transfers[number].due - 0.4 if collective.is_gather else waits[number] + rank * step / 9
            priority.update(dict.fromkeys(collective.after, max(at, until)))
        return reorder(self.graph, lambda position, _: priority.get(position, -1.0))  # `pending` at once

    def _needs(self) -> list[int]:
        """For each collective, the number of the first op that it may start before."""
        before = dependencies(self.graph)
        first: dict[int, int] = {}
        for position in range(len(self.graph.nodes)):
            found = 0
            for other in before[position]:
                found = max(found, self.op_at[other] + 1 if other in self.op_at else first.get(other, 0))
            first[position] = found
        return [first[c.start] for c in self.collectives]

    def _transfer(self, collective: Collective, first: int) -> Transfer:
        graph, node = self.graph, self.graph.nodes[collective.start]
        begin = self.phase_end[Phase.forward] if node.phase is not Phase.forward else 0
        first, end = max(first, begin), self.phase_end[node.phase]
        us, lane = self.context.costs.transfer_us(graph, node, self.context.hints), OPS[node.op].lane
        if not collective.is_gather:
            if lane == "d2h":
                first = max(first, min(self._after_last_use(node.operands[0]), end))
            return Transfer(us, first, end, self._taken_bytes(node), first, lane)
        results = [r for p in collective.after for r in graph.nodes[p].results]
        users = [self.op_at[u] for r in results for u in graph.users.get(r.name, ()) if u in self.op_at]
        due = min(users, default=end)
        return Transfer(us, min(first, due), due, self._brought_bytes(collective, node), due, lane)

    def _after_last_use(self, value: Value) -> int:
        """The op behind the last that touches the memory of a value."""
        roots = self._memory.roots(value.name)
        return max((last + 1 for root, (_, last) in self._uses.items() if root in roots), default=0)

    def _taken_bytes(self, node: Node) -> int:
        """Bytes that a reduction or a copy to the host holds until it is over."""
        mesh, hints = self.graph.mesh, self.context.hints
        if OPS[node.op].lane == "d2h":
            return local_bytes(node.operands[0].type, mesh, hints)
        kept = OPS[node.op].scratch_bytes(node, mesh)
        moves = transfer_of(node)
        if moves is not None and moves.scatters:
            copied = [v.tensor for v in node.operands if is_copied(node, v, mesh)]
            kept += moved_bytes(node, mesh) + sum(padded_bytes(kind, self.graph.num_shards) for kind in copied)
        return kept

    def _brought_bytes(self, collective: Collective, node: Node) -> int:
        """Bytes that a gather or a copy from the host holds before its result is needed."""
        mesh, hints = self.graph.mesh, self.context.hints
        if OPS[node.op].lane == "h2d":
            return local_bytes(node.results[0].type, mesh, hints)
        if node.option("axis") is not None:
            return local_bytes(node.results[0].type, mesh, hints) + OPS[node.op].scratch_bytes(node, mesh)
        whole = moved_bytes(node, mesh)
        prepared = whole // self.graph.num_shards if collective.before else 0
        return whole + max(prepared, OPS[node.op].scratch_bytes(node, mesh))


def lower_bound_us(graph: Graph, context: Context) -> float:
    """A time below which no schedule of this graph can go, whatever the memory: all computing, all communication, or
    the longest way through both."""
    step = LoweredStep(graph, context)
    headroom = (0,) * len(step.ops)
    return step.problem(headroom).lower_bound_us if step.ops else 0.0


def step_bound_us(graph: Graph, context: Context, timeline: Timeline) -> float:
    """A time below which no order of a simulated graph can go: nor can its busiest lane."""
    return max(lower_bound_us(graph, context), timeline.lower_bound_us)


def _collectives(graph: Graph) -> list[Collective]:
    position_of = {r.name: p for p, n in enumerate(graph.nodes) for r in n.results}
    found = []
    for position, node in enumerate(graph.nodes):
        moves = transfer_of(node)
        if moves is None:
            continue
        brings = moves.brings or moves.exchanges
        before: list[int] = []
        todo: list[Node] = [node]
        while todo:
            for value in todo.pop().operands:
                maker = graph.producers.get(value.name)
                if maker is None or maker.op not in OPS or not OPS[maker.op].prepares:
                    continue
                if len(graph.users[maker.results[0].name]) == 1:
                    before.append(position_of[value.name])
                    todo.append(maker)
        after: list[int] = []
        todo = [node]
        while todo:
            for result in todo.pop().results:
                for user in graph.users.get(result.name, ()):
                    follower = graph.nodes[user]
                    if follower.op in ("wait", "unpack", "decode") or (follower.op == "cast" and not brings):
                        after.append(user)
                        todo.append(follower)
        found.append(Collective(position, tuple(before), tuple(after), brings))
    return found
