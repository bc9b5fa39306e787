"""The result of `zgraph.plan`: a plan of training, stage by stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch.distributed.tensor import Placement

from zgraph.cost import Interval, bytes_text
from zgraph.estimate.stage_figures import TIED, StagePlan
from zgraph.viz import as_text, gibibytes


@dataclass(frozen=True)
class TrainingPlan:
    """Result of `zgraph.plan`. Prints as a table.

    Args:
        model: the name of the model's class.
        num_parameters: of all of it.
        num_ranks: ranks that it is sharded over.
        hardware: the name of the hardware.
        budget_bytes: bytes that one rank may have alive.
        stages: one plan for each stage that was asked for, and the best of them with a stage for each parameter where
            that is faster.
        tensor_parallel: ranks that compute each op together.
        context_parallel: ranks that share each sequence.
        expert_parallel: ranks that share the experts.
        num_copies: ranks that hold the same shard: hosts, each of which shards over its own ranks.
        layouts: where the sizes of these were chosen, what was tried and why it is these, in words.
        placements: how the ranks of tensor parallelism cut parameters, by name, where that was searched with the batch
            of the plan; `zgraph.compile(model, parallel=plan)` takes them.
    """

    model: str
    num_parameters: int
    num_ranks: int
    hardware: str
    budget_bytes: int
    stages: tuple[StagePlan, ...]
    tensor_parallel: int = 1
    context_parallel: int = 1
    expert_parallel: int = 1
    num_copies: int = 1
    layouts: str = ""
    placements: Mapping[str, Placement | str] = field(default_factory=dict)

    @property
    def together(self) -> int:
        """Ranks that compute together."""
        return self.tensor_parallel * self.context_parallel * self.expert_parallel

    @property
    def num_batches(self) -> int:
        """Ranks that each have a batch of their own."""
        return self.num_ranks // (self.tensor_parallel * self.context_parallel)

    @property
    def best(self) -> StagePlan | None:
        """The fastest that fits, the lowest stage among those within 1 %; None if none fits."""
        fitting = [s for s in self.stages if s.fits]
        fastest = min((s.total_us for s in fitting), default=0.0)
        return next((s for s in fitting if s.total_us <= TIED * fastest), None)

    @property
    def reason(self) -> str:
        """Why the best is the best, or what is missing."""
        if self.best is None:
            least = min(self.stages, key=lambda s: s.needed_bytes)
            return (
                f"no stage fits {gibibytes(self.budget_bytes)}: stage {least.stage} needs the least, "
                f"{gibibytes(least.needed_bytes)} with all of the forward computed again{resting(least)}; take more "
                "ranks, or a smaller batch"
            )
        others = [s.stage for s in self.stages if not s.fits]
        full = f"; stage {', '.join(map(str, others))} would not fit" if others else ""
        small = f", {len(self.best.whole)} small parameters kept whole" if self.best.whole else ""
        tied = [s.title for s in self.stages if s.fits and s is not self.best and s.time.is_tied(self.best.time)]
        ties = f"; stage {', '.join(tied)} no slower than is certain" if tied else ""
        return f"stage {self.best.stage}{small}: the fastest that fits{resting(self.best)}{ties}{full}"

    @property
    def reserved(self) -> str:
        """Memory that a GPU's allocator reserves at each stage, in words; empty on processors."""
        found = [f"stage {s.title} {bytes_text(s.reserved)}" for s in self.stages if s.reserved is not None]
        if not found:
            return ""
        beside = gibibytes(self.stages[0].beside_bytes)
        return f"reserved by torch's allocator: {', '.join(found)}; beside it {beside} of the driver's and NCCL's"

    def __rich__(self) -> RenderableType:
        title = (
            f"{self.model}, {parameters(self.num_parameters)} on {self.num_ranks} ranks of "
            f"{self.hardware}, {gibibytes(self.budget_bytes)} each"
        ) + (f", {self.together} compute together" if self.together > 1 else "")
        name, unit = ("GiB", 2**30) if any(p.total_bytes >= 2**30 for p in self.stages) else ("MiB", 2**20)
        table = Table(title=f"{title}; sizes in {name}", title_justify="left")
        uses_host = any(plan.host_bytes for plan in self.stages)
        for column in (
            "stage",
            "params",
            "optimizer",
            "gradients",
            "activations",
            "gathered",
            "other",
            "peak",
            "least",
            *("host", "moved") * uses_host,
            "step",
            "80 %",
            "exposed",
            "sent",
            "again",
            "fits",
        ):
            table.add_column(column, justify="right")
        for plan in self.stages:
            peak = plan.peak_bytes
            other = sum(v for k, v in peak.items() if k in ("temporaries", "buckets", "buffers"))
            sizes = (
                peak["parameters"],
                peak["optimizer"],
                peak["gradients"],
                peak["activations"],
                peak["gathered"],
                other,
                plan.total_bytes,
                plan.needed_bytes,
            )
            table.add_row(
                plan.title,
                *(f"{size / unit:,.1f}" for size in sizes),
                *(f"{plan.host_bytes / unit:,.1f}", f"{plan.moved_share:.0%}") * uses_host,
                seconds(plan.total_us, plan.time),
                bounds(plan.time),
                seconds(plan.exposed_us),
                f"{plan.sent_bytes / unit:,.1f}",
                f"{plan.again_share:.0%}",
                "yes" if plan.fits else "no",
                style="bold" if plan is self.best else "",
            )
        return Group(table, Text("\n".join(filter(None, (self.reason, self.reserved, self.layouts)))))

    def __str__(self) -> str:
        return as_text(self, width=150)


def seconds(us: float, known: Interval | None = None) -> str:
    """A time for people: in seconds, or in milliseconds below one; with the digits that its interval knows."""
    unit, factor, digits = ("s", 1e6, 2) if us >= 1e6 else ("ms", 1e3, 1)
    return f"{us / factor:,.{known.scaled(1 / factor).digits if known else digits}f} {unit}"


def bounds(us: Interval) -> str:
    """Bounds of a time for people, in the unit that `seconds` takes."""
    return us.scaled(1e-6 if us.value >= 1e6 else 1e-3).bounds.split(": ")[1]


def resting(plan: StagePlan) -> str:
    """Text that says what is on the host; empty if nothing does."""
    return f" with {plan.offload} on the host" if plan.offload else ""


def parameters(count: int) -> str:
    """How many parameters, for people."""
    return f"{count / 1e9:,.2f} billion parameters" if count >= 1e8 else f"{count / 1e6:,.2f} million parameters"
