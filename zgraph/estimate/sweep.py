"""Plans for several kinds of hardware and several batches side by side, and which of them to take."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from zgraph.estimate.stage_figures import StagePlan
from zgraph.estimate.training_plan import TrainingPlan, bounds, parameters, resting, seconds
from zgraph.viz import gibibytes


@dataclass(frozen=True)
class Combination:
    """One kind of hardware with one batch.

    Args:
        hardware: what the hardware is called.
        batch: rows of one rank's batch.
        num_items: tokens of it, or rows where the model reads no tokens.
        peak_flops: what one device could compute in a second, by its data sheet.
        plan: what training takes.
    """

    hardware: str
    batch: int
    num_items: int
    peak_flops: float
    plan: TrainingPlan

    @property
    def stage(self) -> StagePlan:
        """The best stage; the one that needs the least where none fits."""
        return self.plan.best or min(self.plan.stages, key=lambda s: s.needed_bytes)

    @property
    def fits(self) -> bool:
        return self.plan.best is not None

    @property
    def items_per_s(self) -> float:
        """Items that all ranks together train on in a second; each batch counts once."""
        return 1e6 * self.num_items * self.plan.num_batches / self.stage.total_us

    def training(self, num_items: float, unit: str) -> str:
        """Text that says how long training on so many items takes, in days and in device-hours."""
        days = self.stage.time.scaled(num_items / self.items_per_s / self.stage.total_us / 86400)
        hours = 24 * days.value * self.plan.num_ranks
        return f"{num_items:,.0f} {unit} in {days.text('days')}, {hours:,.0f} device-hours, if nothing fails"

    @property
    def utilisation(self) -> float:
        """The share of the data sheet's rate that goes into matmuls, those that are computed again not counted."""
        return 1e6 * self.stage.flop / self.stage.total_us / self.peak_flops


@dataclass(frozen=True)
class Sweep:
    """Combinations and what to take of them. Prints as a table.

    Args:
        combinations: one or more, of one model.
        unit: what is counted of a batch: "tokens" or "rows".
    """

    combinations: tuple[Combination, ...]
    unit: str

    @property
    def fastest(self) -> Combination | None:
        """Combination that trains on the most items in a second; None if nothing fits."""
        return max((c for c in self.combinations if c.fits), key=lambda c: c.items_per_s, default=None)

    @property
    def smallest(self) -> Combination | None:
        """The fastest on the fewest ranks; None if nothing fits."""
        fitting = (c for c in self.combinations if c.fits)
        return min(fitting, key=lambda c: (c.plan.num_ranks, -c.items_per_s), default=None)

    @property
    def reason(self) -> str:
        """Advice on what to take, in a sentence."""
        if self.fastest is None or self.smallest is None:
            least = min(self.combinations, key=lambda c: c.stage.needed_bytes)
            return f"nothing fits; with batch {least.batch} on {least.hardware}, {least.plan.reason}"
        if self.fastest is self.smallest:
            return f"the fastest that fits, on the fewest ranks: {self._described(self.fastest)}"
        return (
            f"the fastest that fits: {self._described(self.fastest)}; "
            f"the fewest ranks: {self._described(self.smallest)}"
        )

    def _described(self, found: Combination) -> str:
        return (
            f"{found.hardware} ({found.plan.num_ranks} ranks{_together(found.plan)}) with batch {found.batch} "
            f"at stage {found.stage.stage}"
            f"{resting(found.stage)}, {found.items_per_s:,.0f} {self.unit}/s"
        )

    def __rich__(self) -> RenderableType:
        first = self.combinations[0].plan
        table = Table(title=f"{first.model}, {parameters(first.num_parameters)}", title_justify="left")
        together = any(found.plan.together > 1 for found in self.combinations)
        for column in (
            "hardware",
            "ranks",
            *("together",) * together,
            "batch",
            "stage",
            "on the host",
            "peak",
            "budget",
            "step",
            "80 %",
            f"{self.unit}/s",
            "of a rank",
            "MFU",
            "fits",
        ):
            table.add_column(column, justify="left" if column in ("hardware", "on the host") else "right")
        for found in self.combinations:
            stage, plan = found.stage, found.plan
            table.add_row(
                found.hardware,
                str(plan.num_ranks),
                *(str(plan.together),) * together,
                str(found.batch),
                stage.title,
                stage.offload,
                gibibytes(stage.total_bytes),
                gibibytes(plan.budget_bytes),
                seconds(stage.total_us, stage.time),
                bounds(stage.time),
                f"{found.items_per_s:,.0f}",
                f"{found.items_per_s / plan.num_ranks:,.0f}",
                f"{found.utilisation:.0%}",
                "yes" if found.fits else "no",
                style="bold" if found in (self.fastest, self.smallest) else "",
            )
        return Group(table, Text(self.reason))


def _together(plan: TrainingPlan) -> str:
    return f", {plan.together} together" if plan.together > 1 else ""
