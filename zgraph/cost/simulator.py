"""One step of a plan on a clock: which lane runs what when, and what computing waits for.

Four lanes, as on the hardware. The compute lane runs the plan's instructions in order. A start hands its collective to
the communication lane, or its copy to the one of its direction; each runs what it is given in the order in which it was
started. A wait holds the compute lane until that is over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from zgraph.cost.memory import MemoryCurve, simulate_memory
from zgraph.cost.table import CostTable
from zgraph.errors import SimulationError
from zgraph.ir import OPS, Graph, Instruction, Node, Plan
from zgraph.ir.aliases import Aliases
from zgraph.ir.graph import values_in
from zgraph.ir.op_rows import LANES


@dataclass(frozen=True, slots=True)
class Span:
    """Something that runs on a lane from `start_us` to `end_us`."""

    lane: str
    node: str
    op: str
    phase: str
    start_us: float
    end_us: float


@dataclass(frozen=True, slots=True)
class Stall:
    """Computing waits at `node` for the collective or copy `start`."""

    node: str
    start: str
    phase: str
    start_us: float
    us: float


@dataclass(frozen=True)
class Timeline:
    """One step of a plan.

    `step_us` ends with the backward: the optimizer is not in the plan. `memory` has a moment for each instruction, and
    `instants_us` when each of them begins.
    """

    spans: tuple[Span, ...]
    stalls: tuple[Stall, ...]
    step_us: float
    memory: MemoryCurve
    instants_us: tuple[float, ...] = ()
    busy_us: Mapping[str, float] = field(default_factory=dict)

    @property
    def exposed_us(self) -> float:
        """Time that computing waits for communication or copies."""
        return sum(s.us for s in self.stalls)

    @property
    def lower_bound_us(self) -> float:
        """No order can be faster than the busiest lane."""
        return max(self.busy_us.values(), default=0.0)


def simulate(plan: Plan, costs: CostTable, hints: Mapping[str, int], *, straggler: float = 1.0) -> Timeline:
    """Run one training step (or one forward, where there is no backward) on the clock.

    Args:
        plan: the plan.
        costs: durations.
        hints: a number for each symbolic size.
        straggler: how many times as long the rank whose clock it is computes as the others do, from 1 on: they wait for
            it in each collective.

    Raises:
        SimulationError: the plan would deadlock, or touches a buffer that a collective is using.
    """
    clock = _Clock(plan.graph, costs, hints, straggler)
    clock.run(plan.forward.instructions)
    if plan.backward is not None:
        clock.run((plan.loss_only[0] if plan.loss_only else plan.backward).instructions)
    clock.end()
    busy: dict[str, float] = dict.fromkeys(LANES, 0.0)
    for span in clock.spans:
        busy[span.lane] += span.end_us - span.start_us
    memory = simulate_memory(plan, hints)
    return Timeline(tuple(clock.spans), tuple(clock.stalls), clock.now, memory, tuple(clock.instants), busy)


class _Clock:
    def __init__(self, graph: Graph, costs: CostTable, hints: Mapping[str, int], straggler: float) -> None:
        self.graph, self.costs, self.hints, self.straggler = graph, costs, hints, straggler
        self.now = 0.0
        self.lane_free: dict[str, float] = dict.fromkeys(LANES, 0.0)
        self.spans: list[Span] = []
        self.stalls: list[Stall] = []
        self.instants: list[float] = []
        self.over_at: dict[str, float] = {}
        self.aliases = Aliases(graph)
        self.sending: dict[str, str] = {}
        self.slowdown = costs.hardware.overlap_slowdown

    def run(self, instructions: Iterable[Instruction]) -> None:
        for instruction in instructions:
            node = instruction.node
            self.aliases.add(node)
            self.instants.append(self.now)
            if instruction.lane != "compute":
                self.start(node, instruction.lane)
            elif node.op == "wait":
                self.wait(node)
                self.instants[-1] = self.now
            else:
                self.compute(node)

    def start(self, node: Node, lane: str) -> None:
        self.now += self.costs.start_us(node, self.hints)
        begin = max(self.now, self.lane_free[lane])
        end = self.lane_free[lane] = begin + self.costs.transfer_us(self.graph, node, self.hints)
        self.over_at.update((r.name, end) for r in node.results)
        self.spans.append(Span(lane, node.name, node.op, node.phase.value, begin, end))
        alone = len(node.results) == 1  # several operands may go into one result
        for value, result in zip(node.operands, node.results * (len(node.operands) if alone else 1), strict=True):
            self.sending.update(dict.fromkeys(self.aliases.roots(value.name), result.name))

    def wait(self, node: Node) -> None:
        future = node.operands[0].name
        over_at = self.over_at.pop(future, None)
        if over_at is None:
            raise SimulationError(
                f"deadlock: {node.name} ({node.phase.value}) waits for {future}, which no earlier instruction starts"
            )
        if over_at > self.now:
            self.stalls.append(Stall(node.name, future, node.phase.value, self.now, over_at - self.now))
            self.now = over_at
        self.sending = {root: start for root, start in self.sending.items() if start != future}

    def compute(self, node: Node) -> None:
        self.check(node)
        us = self.straggler * self.costs.node_us(self.graph, node, self.hints)
        if not us:
            return
        overlapped = min(max(max(self.lane_free.values()) - self.now, 0.0) / self.slowdown, us)
        end = self.now + us + overlapped * (self.slowdown - 1)
        self.spans.append(Span("compute", node.name, node.op, node.phase.value, self.now, end))
        self.now = end

    def check(self, node: Node) -> None:
        """Nothing may write to, or free, what a collective or a copy is reading."""
        if not self.sending:
            return
        if node.op in OPS:
            touched = node.operands if OPS[node.op].consumes else ()
        else:
            touched = tuple(values_in(tuple(node.args[i] for i in self.graph.foreign[node.op].writes)))
        for value in touched:
            for root in self.aliases.roots(value.name):
                if root in self.sending:
                    raise SimulationError(
                        f"unordered access: {node.name} ({node.op}) writes %{value.name} while {self.sending[root]} "
                        "may still be sending it; put its wait before"
                    )

    def end(self) -> None:
        if self.over_at:
            raise SimulationError(f"nothing waits for {', '.join(sorted(self.over_at))}: the step would never end")
