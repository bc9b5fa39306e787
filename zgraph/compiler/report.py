"""Report of `zgraph.report(model)`: the recipe, what each pass changed, bytes at rest, at the peak, on the wire."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from zgraph.certify.record import Certificate
from zgraph.cost import (
    CostTable,
    Interval,
    MemoryCurve,
    Timeline,
    Traffic,
    bytes_text,
    memory_interval,
    simulate,
    time_interval,
    time_text,
    traffic,
)
from zgraph.cost.capability import planned_library_bytes
from zgraph.cost.memory import Life, alive_at_peak
from zgraph.cost.reserved import Footprint, footprint
from zgraph.cost.work import work
from zgraph.environment import has_expandable_segments
from zgraph.errors import UsageError
from zgraph.ir import InputKind, Plan, TensorType, num_ranks
from zgraph.ir.symbols import evaluate
from zgraph.passes.arena import sizes
from zgraph.passes.core.base import Context
from zgraph.passes.core.instruments import PassSummary
from zgraph.passes.schedule import step_bound_us
from zgraph.runfile.format import RunFile
from zgraph.viz import as_text, memory_chart
from zgraph.viz.page import page

if TYPE_CHECKING:
    from zgraph.runtime.regions import Regions


@dataclass(frozen=True)
class Entry:
    """One captured graph: its plan, what the passes did to it, and what a step of it costs."""

    plan: Plan
    steps: tuple[PassSummary, ...]
    memory: MemoryCurve
    traffic: tuple[Traffic, ...]
    timeline: Timeline
    lower_bound_us: float
    hints: Mapping[str, int]
    costs: CostTable
    run: Callable[[], RunFile]
    """Runs the passes on the graph again, and returns their run file."""
    certificate: Certificate | None = None
    """Certificate of what was checked; None where ZGRAPH_VERIFY=0 left the checks out."""

    @cached_property
    def at_peak(self) -> list[Life]:
        """Values that are alive at the peak, largest first."""
        return alive_at_peak(self.plan, self.hints, self.memory)

    @cached_property
    def flop(self) -> int:
        """FLOP of one rank's matmuls in a step."""
        return sum(int(evaluate(work(self.plan.graph, n).flop, self.hints)) for n in self.plan.graph.nodes)

    @cached_property
    def time(self) -> Interval:
        """The step's time in microseconds, with its interval."""
        return time_interval(self.timeline.step_us, self.plan.graph, self.costs, self.hints)

    @cached_property
    def footprint(self) -> Footprint | None:
        """Bytes that a GPU's allocator has allocated and reserves at the peak; None on processors."""
        if not (planned := self.costs.hardware).has_host:
            return None
        ranks, library = num_ranks(self.plan.graph.mesh), planned_library_bytes(planned)
        policy = has_expandable_segments()
        return footprint(self.plan, self.hints, ranks, expandable=policy, library_bytes=library)

    @property
    def kind(self) -> str:
        return "training" if self.plan.backward is not None else "inference"

    @property
    def gap(self) -> float:
        """How much longer the predicted step is than the lower bound: 0.02 is 2 %."""
        return self.timeline.step_us / self.lower_bound_us - 1 if self.lower_bound_us else 0.0


def make_entry(
    plan: Plan,
    steps: Sequence[PassSummary],
    context: Context,
    run: Callable[[], RunFile],
    timeline: Timeline | None = None,
    certificate: Certificate | None = None,
) -> Entry:
    """The entry of a plan, of which `run` makes the file; the plan is simulated where no timeline is given."""
    timeline = timeline or simulate(plan, context.costs, context.hints)
    bound = step_bound_us(plan.graph, context, timeline)
    known = context.hints, context.costs, run, certificate
    return Entry(plan, tuple(steps), timeline.memory, traffic(plan), timeline, bound, *known)


KERNELS = {
    "triton": "generated, where they are faster",
    "inductor": "Inductor's",
    "auto": "Inductor's, and generated ones where measured faster",
}
"""Words for what runs the ops between collectives."""


@dataclass(frozen=True)
class Report:
    """Report of a compiled model. Prints as a table; its fields are the numbers.

    Args:
        model: the name of the model's class.
        recipe: the pipeline that ran.
        num_ranks: ranks that the model is sharded over.
        whole_bytes: bytes of all parameters, unsharded.
        rest_bytes: bytes of parameters that this rank's device holds at rest.
        state_bytes: bytes of AdamW's two moments there.
        buffer_bytes: bytes of the model's buffers, which every rank holds.
        update_bytes: bytes that the optimizer's step has alive above what is at rest.
        host_bytes: bytes at rest on the host: masters, AdamW's moments of them, and copies to compute with.
        entries: one for each captured graph, in the order of capture.
        regions: what Inductor compiled, if it was to.
        kernels: what runs the ops between collectives.
        float8: which linear layers are multiplied in float8, and why the others are not; empty if none is to be.
        codec: the codecs that were chosen, of gradients and of parameters, and why; empty if there was no choice.
        feedback_bytes: bytes at rest of what codes of gradients have left out.
        code_errors: of each bucket of gradients the relative error of its first code; empty if none is coded.
        copies_bytes: bytes at rest of copies of parameters, which codes change.
        codes: bytes of codes of parameters so far, and of the numbers that they stand for; empty if none is coded.
        cuda_graphs: of each captured graph what the GPU repeats from recordings, and what not and why.
        recorded_bytes: bytes that recordings keep between steps, at most.
        arenas: whether NCCL knows the memory that collectives read and write, and why not; empty where there is none.
        arena_bytes: bytes of it that are kept between steps.
        placements: what searches found: layouts and their speed; of placements the time, the bound and the gap.
        reused: how many plans were reused, and from where; empty where the passes ran for every graph.
    """

    model: str
    recipe: str
    num_ranks: int
    whole_bytes: int
    rest_bytes: int
    state_bytes: int
    buffer_bytes: int
    update_bytes: int
    host_bytes: int
    entries: tuple[Entry, ...]
    regions: Regions | None = None
    kernels: str = "aten"
    float8: str = ""
    codec: str = ""
    feedback_bytes: int = 0
    code_errors: str = ""
    copies_bytes: int = 0
    codes: str = ""
    cuda_graphs: tuple[str, ...] = ()
    recorded_bytes: int = 0
    arenas: str = ""
    arena_bytes: int = 0
    placements: str = ""
    reused: str = ""

    @property
    def step_peak_bytes(self) -> int:
        """The most bytes alive at once in a forward and backward above what is at rest, over all captured graphs."""
        return max((e.memory.peak.total_bytes for e in self.entries), default=0)

    @property
    def host_peak_bytes(self) -> int:
        """The most bytes on the host at once in a step, above what is at rest there: activations and gradients."""
        return max((e.memory.host_peak_bytes for e in self.entries), default=0)

    @property
    def peak_bytes(self) -> int:
        """The most bytes alive at once on this rank in a training step with AdamW, whatever they are for."""
        at_rest = self.rest_bytes + self.state_bytes + self.buffer_bytes + self.feedback_bytes + self.copies_bytes
        if self.recorded_bytes:  # they are there while the optimizer steps
            return at_rest + self.recorded_bytes + self.update_bytes
        return at_rest + max(self.step_peak_bytes, self.arena_bytes + self.update_bytes)

    @property
    def footprint(self) -> Footprint | None:
        """Bytes that a GPU's allocator reserves in training; None on processors, and before one is captured."""
        return next((e.footprint for e in self.entries if e.plan.backward is not None), None)

    @property
    def flop(self) -> int:
        """FLOP of this rank's matmuls in a training step (of the first training graph captured)."""
        return next((e.flop for e in self.entries if e.plan.backward is not None), 0)

    @property
    def sent_bytes(self) -> int:
        """Bytes that this rank sends in a training step (of the first training graph captured)."""
        first = next((e for e in self.entries if e.plan.backward is not None), None)
        return sum(t.sent_bytes for t in first.traffic) if first else 0

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [self._rest()]
        words = {"placements": self.placements, "plans": self.reused}
        parts += [Text(f"{what}: {said}") for what, said in words.items() if said]
        for entry, *others in alike(self.entries):
            parts += [Text(), _passes(entry), _peak(entry), _certified(entry)]
            if entry.traffic:
                parts += [_wire(entry, self.whole_bytes), step_summary(entry)]
            if others:
                parts.append(_like_it(entry, others))
        if not self.entries:
            parts.append(Text("Nothing captured yet: the first call of the model does that.", style="dim"))
        return Group(*parts)

    def __str__(self) -> str:
        return as_text(self, width=110)

    def html(self) -> str:
        """The text of an HTML file that shows the graph after every pass, the timeline, and the memory of the step.

        It is of the first training graph that was captured, or of the first graph where none was.

        Raises:
            UsageError: nothing was captured yet.
        """
        if not self.entries:
            raise UsageError("there is nothing to draw yet: the first call of the model captures it")
        entry = next((e for e in self.entries if e.plan.backward is not None), self.entries[0])
        return page(entry.run())

    def save(self, path: str | PathLike[str]) -> None:
        """Write `html` to a file.

        Raises:
            UsageError: nothing was captured yet.
        """
        Path(path).write_text(self.html(), encoding="utf-8")

    def _repr_html_(self) -> str:
        """The same, as notebooks show it: in a separate frame."""
        if not self.entries:
            return f"<pre>{escape(str(self))}</pre>"
        style = "width: 100%; height: 760px; border: 0"
        return f'<iframe sandbox="allow-scripts" style="{style}" srcdoc="{escape(self.html())}"></iframe>'

    def _peak_text(self) -> str:
        if not self.entries:
            return mebibytes(self.peak_bytes)
        return bytes_text(memory_interval(self.peak_bytes, self.entries[0].costs))

    def _rest(self) -> Table:
        table = Table(title=f"{self.model} on {self.num_ranks} rank{'s' * (self.num_ranks > 1)}", title_justify="left")
        table.add_column("at rest, per rank")
        table.add_column("bytes", justify="right", overflow="fold")
        table.add_row("recipe", self.recipe)
        table.add_row("parameters, whole", mebibytes(self.whole_bytes))
        table.add_row("parameters, this rank", mebibytes(self.rest_bytes))
        table.add_row("with AdamW's two moments", mebibytes(self.rest_bytes + self.state_bytes))
        table.add_row("buffers", mebibytes(self.buffer_bytes))
        table.add_row("above that, in AdamW's step", mebibytes(self.update_bytes))
        table.add_row("peak of a training step", self._peak_text())
        if (found := self.footprint) is not None:
            reserved = memory_interval(max(found.reserved_bytes, self.peak_bytes), self.entries[0].costs)
            table.add_row("reserved for it by torch's allocator", bytes_text(reserved))
            table.add_row("beside it: the driver, NCCL's buffers", mebibytes(found.beside_bytes))
        if self.host_bytes or self.host_peak_bytes:
            table.add_row("on the host: masters and moments", mebibytes(self.host_bytes))
            table.add_row("on the host: at the peak of a step", mebibytes(self.host_bytes + self.host_peak_bytes))
        if self.kernels != "aten":
            table.add_row("kernels", KERNELS[self.kernels])
        if self.float8:
            table.add_row("float8", self.float8)
        if self.codec:
            table.add_row("codec", self.codec)
        if self.code_errors:
            table.add_row("left out by codes, for the next step", mebibytes(self.feedback_bytes))
            table.add_row("relative error of the first codes", self.code_errors)
        if self.codes:
            table.add_row("copies of parameters, for codes", mebibytes(self.copies_bytes))
            table.add_row("codes of this rank's parameters", self.codes)
        if self.arenas:
            table.add_row("arenas", self.arenas)
        for text in self.cuda_graphs:
            table.add_row("CUDA graphs", text)
        if self.regions is not None:
            table.add_row("compiled by Inductor", str(self.regions))
        return table


def alike(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Graphs that the passes did the same to: those of a model that generates, one for each length."""
    found: dict[object, list[Entry]] = {}
    for entry in entries:
        did = tuple((step.text, step.num_nodes, frozenset(step.changed.items())) for step in entry.steps)
        found.setdefault((entry.kind, did), []).append(entry)
    return list(found.values())


MOST_SIZES = 12


def _like_it(entry: Entry, others: Sequence[Entry]) -> Text:
    """The graphs that differ from one in sizes alone."""
    every = [entry, *others]
    lists = [_sizes(e) for e in every]
    columns = [*zip(*lists, strict=True)] if len({*map(len, lists)}) == 1 else []
    varied = dict.fromkeys(column for column in columns if len(set(column)) > 1)
    sizes = [", ".join(map(str, column[:MOST_SIZES])) + ", ..." * (len(column) > MOST_SIZES) for column in varied]
    names = f"{others[0].plan.graph.name} to {others[-1].plan.graph.name}" if others[1:] else others[0].plan.graph.name
    peaks = [e.memory.peak.total_bytes for e in every]
    steps = [e.timeline.step_us for e in every]
    return Text(
        f"and {len(others)} more like it, {names}"
        + (f", of sizes {' and '.join(sizes)}" if sizes else "")
        + f": peak above rest {mebibytes(min(peaks))} to {mebibytes(max(peaks))}, predicted step "
        f"{milliseconds(min(steps))} to {milliseconds(max(steps))}"
    )


def _sizes(entry: Entry) -> list[int]:
    """The sizes of what the model is called with."""
    kinds = [i.value.type for i in entry.plan.graph.inputs if i.kind is InputKind.input]
    return [int(evaluate(dim, entry.hints)) for kind in kinds if isinstance(kind, TensorType) for dim in kind.shape]


def mebibytes(num_bytes: int) -> str:
    """Bytes for people: 1 MiB and more in MiB, less in KiB."""
    return f"{num_bytes / 2**20:,.1f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:,.1f} KiB"


def _passes(entry: Entry) -> Table:
    table = Table(
        title=f"{entry.plan.graph.name}: {entry.kind} graph, plan {entry.plan.fingerprint}", title_justify="left"
    )
    table.add_column("pass")
    table.add_column("changed")
    table.add_column("nodes", justify="right")
    table.add_column("ms", justify="right")
    for step in entry.steps:
        table.add_row(step.text, step.summary, str(step.num_nodes), f"{step.seconds * 1e3:.0f}")
    return table


def _certified(entry: Entry) -> Text:
    return Text(str(entry.certificate or "not certified (ZGRAPH_VERIFY=0)"))


NUM_VALUES = 6


def _peak(entry: Entry) -> Text:
    peak = entry.memory.peak
    shares = ", ".join(
        f"{name} {mebibytes(size)}"
        for name, size in sorted(peak.bytes_by_category.items(), key=lambda i: -i[1])
        if size
    )
    text = Text(f"peak above rest {mebibytes(peak.total_bytes)} at %{peak.node} ({peak.phase}): {shares}\n")
    text.append_text(memory_chart(entry.memory)).append("\nlargest at the peak: ")
    names = [f"%{life.name} {mebibytes(life.num_bytes)} ({life.category})" for life in entry.at_peak[:NUM_VALUES]]
    text.append(", ".join(names))
    for program, arena in sizes(entry.plan.graph).items():
        size, bound = mebibytes(arena.num_bytes), mebibytes(arena.crowded_bytes)
        text.append(f"\narena of the {program.name} {size}, lower bound {bound}")
    return text


NUM_STALLS = 5


def step_summary(entry: Entry) -> Text:
    """Predicted time, the bound below which no order can go, and what computing waits for."""
    timeline = entry.timeline
    text = Text(
        f"predicted step {time_text(entry.time)}, lower bound {milliseconds(entry.lower_bound_us)}, gap "
        f"{max(entry.gap, 0.0):.1%}: computing {milliseconds(timeline.busy_us['compute'])}, communication "
        f"{milliseconds(timeline.busy_us['comm'])}, "
    )
    if copies := timeline.busy_us["d2h"] + timeline.busy_us["h2d"]:
        text.append(f"copies to the host and back {milliseconds(copies)}, ")
    text.append(f"of which {milliseconds(timeline.exposed_us)} exposed")
    stalls = sorted(timeline.stalls, key=lambda s: -s.us)
    for stall in stalls[:NUM_STALLS]:
        text.append(f"\n  {milliseconds(stall.us)} ({stall.phase}) {stall.node} waits for {stall.start}")
    if len(stalls) > NUM_STALLS:
        rest = sum(s.us for s in stalls[NUM_STALLS:])
        text.append(f"\n  {milliseconds(rest)} in {len(stalls) - NUM_STALLS} more waits")
    return text


def milliseconds(us: float) -> str:
    """A time for people: in milliseconds, or in microseconds where it is short."""
    return f"{us / 1e3:,.1f} ms" if us >= 100 else f"{us:,.1f} us"


def _wire(entry: Entry, whole_bytes: int) -> Table:
    table = Table()
    table.add_column("collective, per step")
    table.add_column("phase")
    table.add_column("calls", justify="right")
    table.add_column("sent per rank", justify="right")
    table.add_column("of the model", justify="right")
    for row in entry.traffic:
        share = f"{row.sent_bytes / whole_bytes:.2f}" if whole_bytes else ""
        table.add_row(row.op, row.phase, str(row.num_calls), mebibytes(row.sent_bytes), share)
    return table
