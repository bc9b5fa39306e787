"""`zgraph.plan`: what training a model takes on hardware that is not here, stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn

from zgraph.bridge.aten import compute_dtype
from zgraph.bridge.dtypes import Dtype, as_dtype_or_none
from zgraph.bridge.target import MEMORY_MARGIN, Target, cost_table, num_bytes, planned_budget
from zgraph.errors import UsageError
from zgraph.estimate.layer_scaling import LayerSamples, capture_samples
from zgraph.estimate.stage_plan import Planner, StagePlan
from zgraph.options.offload import Offload, activations, places
from zgraph.options.validate import Compute, Kernels, check_compute, check_kernels, default_kernels
from zgraph.passes import RECIPES
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
    """

    model: str
    num_parameters: int
    num_ranks: int
    hardware: str
    budget_bytes: int
    stages: tuple[StagePlan, ...]
    tensor_parallel: int = 1

    @property
    def best(self) -> StagePlan | None:
        """The fastest that fits, the lowest stage among those within 1 %; None if none fits."""
        fitting = [s for s in self.stages if s.fits]
        fastest = min((s.total_us for s in fitting), default=0.0)
        return next((s for s in fitting if s.total_us <= 1.01 * fastest), None)

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
        return f"stage {self.best.stage}{small}: the fastest that fits{resting(self.best)}{full}"

    def __rich__(self) -> RenderableType:
        title = (
            f"{self.model}, {parameters(self.num_parameters)} on {self.num_ranks} ranks of "
            f"{self.hardware}, {gibibytes(self.budget_bytes)} each"
        ) + (f", {self.tensor_parallel} compute together" if self.tensor_parallel > 1 else "")
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
                seconds(plan.total_us),
                seconds(plan.exposed_us),
                f"{plan.sent_bytes / unit:,.1f}",
                f"{plan.again_share:.0%}",
                "yes" if plan.fits else "no",
                style="bold" if plan is self.best else "",
            )
        return Group(table, Text(self.reason))

    def __str__(self) -> str:
        return as_text(self, width=150)


def plan(
    model: nn.Module,
    *args: Any,
    hardware: Target = "h100",
    num_ranks: int | None = None,
    memory_budget: int | str | None = None,
    stage: int | Sequence[int] | None = None,
    offload: Offload = "auto",
    param_dtype: Dtype | None = None,
    kernels: Kernels | None = None,
    compute: Compute | None = None,
    tensor_parallel: int = 1,
    **kwargs: Any,
) -> TrainingPlan:
    """Plans memory and time of training a model with AdamW, without the hardware: no process group, device or memory.

    If a stage does not fit the budget, as much of the forward as needed is computed again or moved to the host. If that
    is not enough, optimizer states and then parameters are on the host. Layers of one class with parameters of the same
    shapes count as repeated.

    Args:
        model: a module, on the meta device or any other; it is not changed.
        args, kwargs: what its forward is called with on one rank; only shapes and dtypes matter.
        hardware: a profile's name (`16x8-h100`), as in `zgraph.compile`.
        num_ranks: ranks to shard over; by default all devices of the hardware.
        memory_budget: bytes of one rank; by default the device's memory less a margin of 6 %, or more on
            small GPUs.
        stage: a stage, or several; by default all, and the best of them once more with small parameters kept whole if
            that is faster. `zgraph.compile(model, stage=found.best.stage_of)` takes it.
        offload: what may go to the host's memory, as in `zgraph.compile`.
        param_dtype: dtype to compute in, as in `zgraph.compile`.
        kernels: what runs the ops between collectives, as in `zgraph.compile`; by default what that takes on the
            hardware. "inductor" and "auto" are planned op by op, as if Inductor saved nothing.
        compute: what matrices are multiplied in, as in `zgraph.compile`.
        tensor_parallel: ranks that compute each op together, with the same batch, by placements that are searched as
            `zgraph.search_placements` does.

    Raises:
        UsageError, DtypeError: an option means nothing.
        HardwareError: there is no such hardware, or the ranks do not fill its hosts.
        CaptureError, GraphBreakError: as `zgraph.compile` does at the first call.
    """
    (found,) = sweep(
        model,
        *args,
        hardware=(hardware,),
        num_ranks=num_ranks,
        memory_budget=memory_budget,
        stage=stage,
        offload=offload,
        param_dtype=param_dtype,
        kernels=kernels,
        compute=compute,
        tensor_parallel=tensor_parallel,
        **kwargs,
    )
    return found


def sweep(
    model: nn.Module,
    *args: Any,
    hardware: Sequence[Target],
    num_ranks: int | None = None,
    memory_budget: int | str | None = None,
    stage: int | Sequence[int] | None = None,
    offload: Offload = "auto",
    param_dtype: Dtype | None = None,
    kernels: Kernels | None = None,
    compute: Compute | None = None,
    tensor_parallel: int = 1,
    **kwargs: Any,
) -> tuple[TrainingPlan, ...]:
    """`plan` for several kinds of hardware, with the model captured once.

    Args:
        hardware: what to plan for, one plan each.
        model, args, kwargs, num_ranks, memory_budget, stage, offload, param_dtype, kernels, compute: as for `plan`.
        tensor_parallel: as for `plan`.

    Raises:
        UsageError, HardwareError, CaptureError, GraphBreakError: as `plan` does.
    """
    wanted = tuple(RECIPES) if stage is None else stage
    stages = (wanted,) if isinstance(wanted, int) else tuple(wanted)
    if unknown := [s for s in stages if s not in RECIPES]:
        raise UsageError(f"stage must be 0, 1, 2 or 3, not {unknown[0]!r}")
    if num_ranks is not None and num_ranks < 1:
        raise UsageError(f"num_ranks must be 1 or more, not {num_ranks}")
    dtype = as_dtype_or_none(param_dtype, "param_dtype")
    check_kernels(kernels, has_recipe=False)
    check_compute(compute)
    _check_parallel(tensor_parallel, compute)
    makers = [
        _planner(target, num_ranks, memory_budget, offload, kernels, compute, tensor_parallel) for target in hardware
    ]
    samples = capture_samples(model, args, kwargs, dtype)
    num_parameters = sum(p.numel() for p in model.parameters())
    sizes = [(n, p.numel() * compute_dtype(p, dtype).itemsize) for n, p in model.named_parameters()]
    plans = []
    for make in makers:
        planner = make(samples)
        found = tuple(map(planner.plan, stages))
        whole = TrainingPlan(
            type(model).__name__,
            num_parameters,
            planner.num_ranks,
            planner.costs.hardware.name,
            planner.budget,
            found,
            tensor_parallel,
        )
        if stage is None and whole.best is not None:
            refined = planner.refined(whole.best, sizes)
            whole = whole if refined is whole.best else replace(whole, stages=(*found, refined))
        plans.append(whole)
    return tuple(plans)


def _planner(
    target: Target,
    num_ranks: int | None,
    memory_budget: int | str | None,
    offload: Offload,
    kernels: Kernels | None,
    compute: Compute | None,
    tensor: int,
) -> Callable[[LayerSamples], Planner]:
    """A planner for one kind of hardware, once the model is captured."""
    costs = cost_table(target, torch.device("cpu"))
    hardware = costs.hardware
    count = hardware.num_devices if num_ranks is None else num_ranks
    if count % tensor:
        raise UsageError(f"tensor_parallel={tensor} does not divide the {count} ranks; take a multiple of it")
    budget = planned_budget(hardware, count) if memory_budget is None else num_bytes(memory_budget)
    host_bytes = hardware.host_memory_bytes * (1 - MEMORY_MARGIN) / hardware.spread(count)[1]
    return partial(
        Planner,
        num_ranks=count,
        costs=costs,
        budget=budget,
        host_budget=int(host_bytes) or None,
        places=places(offload, is_gpu=hardware.has_host),
        moves=activations(offload, budget, is_gpu=hardware.has_host) != "never",
        kernels=kernels or default_kernels(is_gpu=hardware.has_host),
        compute=compute,
        tensor=tensor,
    )


def _check_parallel(tensor_parallel: int, compute: Compute | None) -> None:
    """Refuse what does not go with ranks that compute together."""
    if isinstance(tensor_parallel, bool) or not isinstance(tensor_parallel, int) or tensor_parallel < 1:
        raise UsageError(f"tensor_parallel must be a number of ranks, 1 or more, not {tensor_parallel!r}")
    if tensor_parallel > 1 and compute is not None:
        raise UsageError(
            f"float8 takes its scales from whole matrices: leave compute={compute!r} or tensor_parallel= out"
        )


def seconds(us: float) -> str:
    """A time for people: in seconds, or in milliseconds below one."""
    return f"{us / 1e6:,.2f} s" if us >= 1e6 else f"{us / 1e3:,.1f} ms"


def resting(plan: StagePlan) -> str:
    """Text that says what is on the host; empty if nothing does."""
    return f" with {plan.offload} on the host" if plan.offload else ""


def parameters(count: int) -> str:
    """How many parameters, for people."""
    return f"{count / 1e9:,.2f} billion parameters" if count >= 1e8 else f"{count / 1e6:,.2f} million parameters"
