"""`zgraph.plan`: what training a model takes on hardware that is not here, stage by stage.

Layers that are alike are not captured one by one. The model is captured with two layers of each stack, and with one
more; every figure grows linearly from there, as the layers of a stack do the same. Bytes are followed in two parts of
the step: until the backward reaches the first layer, where activations have their peak, and from there on, where
gradients have theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn

from zgraph.capture import trace
from zgraph.cost import CostTable, Moment, simulate, traffic
from zgraph.cost.memory import local_bytes
from zgraph.cost.work import work
from zgraph.errors import UsageError
from zgraph.ir import Axis, Graph, InputKind, Phase
from zgraph.passes import RECIPES, Context, Pipeline, make_plan, parse_recipe
from zgraph.passes.analysis.forward import Forward
from zgraph.passes.fit import Fit
from zgraph.passes.outlook import step_memory
from zgraph.target import MARGIN, Target, cost_table, num_bytes
from zgraph.viz import as_text

FEW_LAYERS = 2


@dataclass(frozen=True)
class StagePlan:
    """What one stage takes on each rank.

    Args:
        stage: the ZeRO stage.
        rest_bytes: bytes at rest by category: parameters, optimizer state, buffers.
        peak_bytes: bytes by category at the peak of the step, those at rest included.
        needed_bytes: the peak if the whole forward is computed again, layer by layer: what the stage cannot do without.
        step_us: the predicted time of a forward and backward.
        exposed_us: the part of it in which computing waits for communication.
        sent_bytes: what a rank sends in a step.
        again_share: FLOP of what is computed again, over those of the step without.
        fits: whether the peak is within the budget.
    """

    stage: int
    rest_bytes: dict[str, int]
    peak_bytes: dict[str, int]
    needed_bytes: int
    step_us: float
    exposed_us: float
    sent_bytes: int
    again_share: float
    fits: bool

    @property
    def total_bytes(self) -> int:
        """All bytes at the peak."""
        return sum(self.peak_bytes.values())


@dataclass(frozen=True)
class TrainingPlan:
    """What `zgraph.plan` found. Prints as a table.

    Args:
        model: the name of the model's class.
        num_parameters: of all of it.
        num_ranks: ranks that it is sharded over.
        hardware: the name of the hardware.
        budget_bytes: bytes that one rank may have alive.
        stages: one plan for each stage that was asked for.
    """

    model: str
    num_parameters: int
    num_ranks: int
    hardware: str
    budget_bytes: int
    stages: tuple[StagePlan, ...]

    @property
    def best(self) -> StagePlan | None:
        """The fastest that fits, the lowest stage among those within 1 %; None if none fits."""
        fitting = [s for s in self.stages if s.fits]
        fastest = min((s.step_us for s in fitting), default=0.0)
        return next((s for s in fitting if s.step_us <= 1.01 * fastest), None)

    @property
    def reason(self) -> str:
        """Why the best is the best, or what is missing."""
        if self.best is None:
            least = min(self.stages, key=lambda s: s.needed_bytes)
            return (
                f"no stage fits {_gibibytes(self.budget_bytes)}: stage {least.stage} needs the least, "
                f"{_gibibytes(least.needed_bytes)} with all of the forward computed again; take more ranks, or a "
                "smaller batch"
            )
        others = [s.stage for s in self.stages if not s.fits]
        full = f"; stage {', '.join(map(str, others))} would not fit" if others else ""
        return f"stage {self.best.stage}: the fastest that fits{full}"

    def __rich__(self) -> RenderableType:
        title = (
            f"{self.model}, {self.num_parameters / 1e9:,.2f} billion parameters on {self.num_ranks} ranks of "
            f"{self.hardware}, {_gibibytes(self.budget_bytes)} each"
        )
        table = Table(title=title, title_justify="left")
        for column in ("stage", "params", "optimizer", "gradients", "activations", "gathered", "other", "peak", "least",
                       "step", "exposed", "sent", "again", "fits"):  # fmt: skip
            table.add_column(column, justify="right")
        for plan in self.stages:
            peak = plan.peak_bytes
            other = sum(v for k, v in peak.items() if k in ("temporaries", "buckets", "buffers"))
            sizes = (peak["parameters"], peak["optimizer"], peak["gradients"], peak["activations"], peak["gathered"],
                     other, plan.total_bytes, plan.needed_bytes)  # fmt: skip
            table.add_row(
                str(plan.stage), *map(_gibibytes, sizes), f"{plan.step_us / 1e6:,.2f} s",
                f"{plan.exposed_us / 1e6:,.2f} s", _gibibytes(plan.sent_bytes), f"{plan.again_share:.0%}",
                "yes" if plan.fits else "no", style="bold" if plan is self.best else "",
            )  # fmt: skip
        return Group(table, Text(self.reason))

    def __str__(self) -> str:
        return as_text(self, width=150)


def plan(
    model: nn.Module, *args: Any, hardware: Target = "h100", num_ranks: int | None = None,
    memory_budget: int | str | None = None, stage: int | Sequence[int] | None = None,
    param_dtype: torch.dtype | None = None, **kwargs: Any,
) -> TrainingPlan:  # fmt: skip
    """What training a model with AdamW takes, without the hardware: no process group, no device, no memory.

    Where a stage does not fit the budget as it is, as much of the forward is computed again as it takes. Layers of one
    class and with parameters of the same shapes are taken to be alike.

    Args:
        model: a module, on the meta device or any other; it is not changed.
        args, kwargs: what its forward is called with on one rank; only shapes and dtypes matter.
        hardware: a profile's name (`16x8-h100`), as in `zgraph.compile`.
        num_ranks: ranks to shard over; by default all devices of the hardware.
        memory_budget: bytes of one rank; by default the device's memory less a margin of 6 %.
        stage: a stage, or several; by default all.
        param_dtype: dtype to compute in, as in `zgraph.compile`.

    Raises:
        UsageError: an option means nothing.
        HardwareError: there is no such hardware, or the ranks do not fill its hosts.
        CaptureError, GraphBreakError: as `zgraph.compile` does at the first call.
    """
    wanted = tuple(RECIPES) if stage is None else stage
    stages = (wanted,) if isinstance(wanted, int) else tuple(wanted)
    if unknown := [s for s in stages if s not in RECIPES]:
        raise UsageError(f"stage must be 0, 1, 2 or 3, not {unknown[0]!r}")
    costs = cost_table(hardware, torch.device("cpu"))
    count = costs.hardware.num_devices if num_ranks is None else num_ranks
    if count < 1:
        raise UsageError(f"num_ranks must be 1 or more, not {count}")
    device_bytes = int(costs.hardware.device.memory_bytes * (1 - MARGIN))
    budget = device_bytes if memory_budget is None else num_bytes(memory_budget)
    family = _captured(model, args, kwargs, param_dtype)
    found = tuple(_stage_plan(family, s, count, costs, budget) for s in stages)
    num_parameters = sum(p.numel() for p in model.parameters())
    return TrainingPlan(type(model).__name__, num_parameters, count, costs.hardware.name, budget, found)


# --- a model in few layers -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """A model captured with few layers, and with one more of each stack.

    Args:
        base: with `FEW_LAYERS` of each stack.
        longer: for each stack, with one more of it.
        missing: for each stack, how many layers the model has beyond the base.
    """

    base: Graph
    longer: tuple[Graph, ...]
    missing: tuple[int, ...]

    def grown(self, base: float, longer: Sequence[float]) -> float:
        """A figure of the whole model from those of the graphs."""
        return base + sum(n * (value - base) for n, value in zip(self.missing, longer, strict=True))


def _captured(model: nn.Module, args: Any, kwargs: Any, param_dtype: torch.dtype | None) -> Family:
    def capture(lengths: dict[nn.ModuleList, int]) -> Graph:
        with _shortened(lengths):
            return trace(model, *args, param_dtype=param_dtype, **kwargs)

    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and _are_alike(m)]
    few = dict.fromkeys(stacks, FEW_LAYERS)
    longer = tuple(capture({**few, stack: FEW_LAYERS + 1}) for stack in stacks)
    return Family(capture(few), longer, tuple(len(stack) - FEW_LAYERS for stack in stacks))


def _are_alike(stack: nn.ModuleList) -> bool:
    """Whether there are enough layers to leave some out, and all are of one kind."""
    kinds = {(type(m), tuple((n, p.shape, p.dtype) for n, p in m.named_parameters())) for m in stack}
    return len(stack) > FEW_LAYERS + 1 and len(kinds) == 1


@contextmanager
def _shortened(lengths: dict[nn.ModuleList, int]) -> Iterator[None]:
    """Stacks with their first layers only."""
    whole = {stack: dict(stack._modules) for stack in lengths}
    try:
        for stack, length in lengths.items():
            stack._modules = {str(i): whole[stack][str(i)] for i in range(length)}
        yield
    finally:
        for stack, modules in whole.items():
            stack._modules = modules


# --- one stage -----------------------------------------------------------------------------------------------------


class _Member:
    """One graph of the family at one stage, with all blocks keeping what is worth a price."""

    def __init__(self, graph: Graph, stage: int, context: Context) -> None:
        self.context = context
        passes = parse_recipe(RECIPES[stage]).passes
        at = next(i for i, step in enumerate(passes) if step.name == Fit.name)
        self.tail = Pipeline(passes[at + 1 :])
        self.placed = Pipeline(passes[:at]).run(graph, context)
        self.forward = Forward(self.placed, context)

    def graph(self, us_per_byte: float | None) -> Graph:
        """The placed graph; at a price, without what is not worth its bytes."""
        if us_per_byte is None:
            return self.placed
        return self.forward.keeping(self.forward.choices_at(us_per_byte))

    def peaks(self, us_per_byte: float | None) -> tuple[Moment, Moment]:
        """The highest moments before the backward reaches the first layer, and after."""
        graph = self.graph(us_per_byte)
        moments = step_memory(graph, self.context).moments
        layers = {n.name: n.origin.module for n in graph.nodes if n.phase is Phase.backward}
        first = next(
            (i for i, m in enumerate(moments) if m.phase == "bwd" and ".0." in f"{layers.get(m.node, '')}."),
            len(moments),
        )
        before, after = moments[:first] or moments, moments[first:] or moments
        return max(before, key=lambda m: m.total_bytes), max(after, key=lambda m: m.total_bytes)

    def figures(self, us_per_byte: float | None) -> tuple[float, float, float, float]:
        """Microseconds of the step and of what is exposed, bytes sent, and FLOP."""
        scheduled = self.tail.run(self.graph(us_per_byte), self.context)
        whole = make_plan(scheduled, only_synced=True)
        timeline = simulate(whole, self.context.costs, self.context.hints)
        sent = sum(t.sent_bytes for t in traffic(whole))
        return timeline.step_us, timeline.exposed_us, sent, sum(work(scheduled, n).flop for n in scheduled.nodes)

    def at_rest(self) -> tuple[int, int]:
        """Bytes of this rank's parameters, and of buffers."""

        def total(*kinds: InputKind) -> int:
            values = [i.value for i in self.placed.inputs if i.kind in kinds]
            return sum(local_bytes(v.type, self.placed.mesh, {}) for v in values)

        return total(InputKind.param), total(InputKind.buffer, InputKind.constant)

    @property
    def prices(self) -> list[float]:
        """Prices between which some block's choice changes."""
        return self.forward.prices()


def _stage_plan(family: Family, stage: int, num_ranks: int, costs: CostTable, budget: int) -> StagePlan:
    mesh = (Axis("shard", num_ranks),) if num_ranks > 1 else ()
    context = Context(mesh=mesh, costs=costs, groups_calls=True)
    base, *longer = (_Member(g, stage, context) for g in (family.base, *family.longer))
    trials = (base, *longer)

    def grown(figures: Sequence[Sequence[float]]) -> list[float]:
        return [max(family.grown(f[0], f[1:]), 0.0) for f in zip(*figures, strict=True)]

    parameters, buffers = (int(v) for v in grown([t.at_rest() for t in trials]))
    rest = {"parameters": parameters, "optimizer": 2 * parameters, "buffers": buffers}

    def peak(price: float | None) -> dict[str, int]:
        found = [t.peaks(price) for t in trials]
        parts = [_grown_moment(family, [f[part] for f in found]) for part in (0, 1)]
        update = {"gradients": 2 * parameters}  # with one more copy, for torch's AdamW
        highest = max([*parts, update], key=lambda m: sum(m.values()))
        empty = dict.fromkeys(("activations", "temporaries", "gathered", "gradients", "buckets"), 0)
        return {**rest, **empty, **highest}

    prices: list[float | None] = [None, *base.prices]
    least = peak(prices[-1])
    low, high = 0, len(prices) - 1  # the first price at which it fits is in (low, high]
    chosen = peak(None)
    if sum(chosen.values()) > budget:
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if sum(peak(prices[middle]).values()) <= budget else (middle, high)
        chosen = peak(prices[high])
    else:
        high = 0
    step_us, exposed_us, sent, flop = grown([t.figures(prices[high]) for t in trials])
    usual = sum(grown([(float(sum(work(t.placed, n).flop for n in t.placed.nodes)),) for t in trials]))
    return StagePlan(
        stage, rest, chosen, min(sum(least.values()), sum(chosen.values())), step_us, exposed_us, int(sent),
        flop / usual - 1 if usual else 0.0, sum(chosen.values()) <= budget,
    )  # fmt: skip


def _grown_moment(family: Family, moments: Sequence[Moment]) -> dict[str, int]:
    names = {name for m in moments for name in m.bytes_by_category}
    found = {}
    for name in names:
        sizes = [m.bytes_by_category.get(name, 0) for m in moments]
        found[name] = int(family.grown(sizes[0], sizes[1:]))
    return found


def _gibibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"
