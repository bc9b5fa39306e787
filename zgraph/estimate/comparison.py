"""Predicted and measured: how far a step was off, and which ops are to blame."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from zgraph.cost import CostTable, Hardware, Interval, Timeline, simulate, time_interval, time_text
from zgraph.errors import RecordError
from zgraph.passes.plan.make_plan import make_plan
from zgraph.runfile.records import Record
from zgraph.viz import as_text

WAITS = "waits for transfers"

_NUM_ROWS = 12


@dataclass(frozen=True)
class OpTime:
    """Times of all nodes of one op in a step, in microseconds."""

    op: str
    count: int
    predicted_us: float
    measured_us: float

    @property
    def off_us(self) -> float:
        """How much longer they took than was predicted; less than 0 where they were faster."""
        return self.measured_us - self.predicted_us


@dataclass(frozen=True)
class Comparison:
    """A recorded training beside what was predicted of it. Prints as a table; its fields are the numbers.

    Args:
        hardware: that was planned with.
        predicted: a step's microseconds, from the forward's first node to the backward's last.
        measured_us: the median of the steps.
        low_us, high_us: between which four of five steps lie.
        num_steps: of each rank.
        ops: times of each op that the compute lane runs, and of its waits, the most off first. They are of steps that
            ran node by node, which Inductor's regions make longer than a step.
    """

    hardware: str
    predicted: Interval
    measured_us: float
    low_us: float
    high_us: float
    num_steps: int
    ops: tuple[OpTime, ...]

    @property
    def off(self) -> float:
        """How much longer a step took than was predicted: 0.1 is 10 %."""
        return self.measured_us / self.predicted.value - 1

    @property
    def is_within(self) -> bool:
        """Whether the measured step lies in the predicted interval."""
        return self.predicted.low <= self.measured_us <= self.predicted.high

    def __rich__(self) -> RenderableType:
        measured = Interval(self.low_us, self.measured_us, self.high_us)
        verdict = "within" if self.is_within else "outside of"
        table = Table("op", "nodes", "predicted", "measured", "off by", title="most to blame", title_justify="left")
        for column in table.columns[1:]:
            column.justify = "right"
        for row in self.ops[:_NUM_ROWS]:
            times = (row.predicted_us, row.measured_us, row.off_us)
            table.add_row(row.op, f"{row.count:,}", *(f"{us / 1e3:,.3f} ms" for us in times))
        if len(self.ops) > _NUM_ROWS:
            left = self.ops[_NUM_ROWS:]
            off = sum(row.off_us for row in left)
            table.add_row(f"{len(left)} more", f"{sum(r.count for r in left):,}", "", "", f"{off / 1e3:,.3f} ms")
        return Group(
            Text(f"predicted step  {time_text(self.predicted)}, with the profile {self.hardware}"),
            Text(f"measured step   {time_text(measured)}, {self.num_steps:,} steps a rank"),
            Text(f"off by          {100 * self.off:+.0f} %, {verdict} the predicted interval"),
            Text(),
            table,
        )

    def __str__(self) -> str:
        return as_text(self, width=110)


def compare(record: Record, costs: CostTable | None = None) -> Comparison:
    """Compare a recorded training with its prediction.

    Args:
        record: what was recorded.
        costs: to predict with; by default those that it was planned with.

    Raises:
        RecordError: the recorded graph cannot be planned.
    """
    context = record.run.context
    timeline = predicted(record, costs)
    graph = record.run.graph()
    of_node = {(n.phase, n.name): n for n in graph.nodes}
    spent: Mapping[str, float] = defaultdict(float)
    for span in timeline.spans:
        if span.lane == "compute":
            spent[span.node] += span.end_us - span.start_us  # type: ignore[index]
    stalled = sum(stall.us for stall in timeline.stalls)
    count: dict[str, int] = defaultdict(int)
    foreseen: dict[str, float] = defaultdict(float)
    took: dict[str, float] = defaultdict(float)
    measured = record.nodes_us
    for node in of_node.values():
        if node.name in measured:
            op = WAITS if node.op == "wait" else node.op
            count[op] += 1
            took[op] += measured[node.name]
            foreseen[op] += spent.get(node.name, 0.0)
    if WAITS in count or stalled:
        foreseen[WAITS] = stalled
    ops = [OpTime(op, count[op], foreseen[op], took[op]) for op in foreseen]
    known = costs or context.costs
    return Comparison(
        known.hardware.name,
        time_interval(timeline.step_us, graph, known, context.hints),
        record.step_us,
        record.quantile_us(0.1),
        record.quantile_us(0.9),
        record.num_steps,
        tuple(sorted(ops, key=lambda row: -abs(row.off_us))),
    )


def costs_on(record: Record, hardware: Hardware) -> CostTable:
    """Costs of a recorded run on hardware, without what was measured of it before."""
    update = {"hardware": hardware, "ops": {}, "transfers": {}}
    return record.run.context.costs.model_copy(update=update)


def predicted(record: Record, costs: CostTable | None = None) -> Timeline:
    """The predicted step of a recorded training, with other costs where they are given. Raises RecordError."""
    run = record.run
    if costs is None:
        found = run.timeline
    else:
        found = simulate(make_plan(run.graph(), only_step=True), costs, run.context.hints)
    if found is None:
        raise RecordError(f"the graph of {record.path} cannot be planned; record again")
    return found


__all__ = ["WAITS", "Comparison", "OpTime", "compare", "costs_on", "predicted"]
