"""`zgraph.plan`: what training a model takes on hardware that is not here, stage by stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn

from zgraph.bridge.aten import FROM_TORCH, compute_dtype
from zgraph.bridge.dtypes import Dtype, as_dtype_or_none
from zgraph.bridge.private_gpu import TORCH_KERNELS, Capability, chosen_attention
from zgraph.bridge.target import MEMORY_MARGIN, Target, alike_capability, cost_table, num_bytes, planned_budget
from zgraph.cost import CostTable, Interval
from zgraph.cost.workspace import NUM_THREADS
from zgraph.errors import UsageError
from zgraph.estimate.layer_scaling import LayerSamples, capture_samples
from zgraph.estimate.stage_plan import Planner, StagePlan
from zgraph.options.compression import Compress, planned_codec
from zgraph.options.offload import Offload, activations, places
from zgraph.options.settings import RECOMPUTES, Recompute, check_recompute
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
        context_parallel: ranks that share each sequence.
    """

    model: str
    num_parameters: int
    num_ranks: int
    hardware: str
    budget_bytes: int
    stages: tuple[StagePlan, ...]
    tensor_parallel: int = 1
    context_parallel: int = 1

    @property
    def together(self) -> int:
        """Ranks that have the same batch."""
        return self.tensor_parallel * self.context_parallel

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
        tied = [s.title for s in self.stages if s.fits and s is not self.best and s.time.is_tied(self.best.time)]
        ties = f"; stage {', '.join(tied)} no slower than is certain" if tied else ""
        return f"stage {self.best.stage}{small}: the fastest that fits{resting(self.best)}{ties}{full}"

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
    compress: Compress = None,
    recompute: Recompute = "auto",
    reduce_dtype: Dtype | None = None,
    accumulation: int = 1,
    mesh: tuple[int, int] | None = None,
    attention: str | None = None,
    tensor_parallel: int = 1,
    context_parallel: int = 1,
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
        compress: a codec, "auto" or "exact", as in `zgraph.compile`; what codes leave out, and copies that exact codes
            change, count as optimizer state.
        recompute: what is computed again, as in `zgraph.compile`.
        reduce_dtype: dtype in which gradients are averaged over ranks, as in `zgraph.compile`.
        accumulation: micro-steps of a step; all but the last are under `zgraph.no_sync`.
        mesh: ranks that hold the same shard, and ranks that parameters are sharded over; their product is `num_ranks`.
        attention: the kernel that attention runs as: "math", "efficient", "flash" or "cudnn", which torch can be told
            to take, and where the profile has its rate another, such as "flash3" or "triton". By default what torch
            takes on the hardware.
        tensor_parallel: ranks that compute each op together, with the same batch, by placements that are searched as
            `zgraph.search_placements` does.
        context_parallel: ranks that share each sequence, as in `zgraph.compile`.

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
        compress=compress,
        recompute=recompute,
        reduce_dtype=reduce_dtype,
        accumulation=accumulation,
        mesh=mesh,
        attention=attention,
        tensor_parallel=tensor_parallel,
        context_parallel=context_parallel,
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
    compress: Compress = None,
    recompute: Recompute = "auto",
    reduce_dtype: Dtype | None = None,
    accumulation: int = 1,
    mesh: tuple[int, int] | None = None,
    attention: str | None = None,
    tensor_parallel: int = 1,
    context_parallel: int = 1,
    **kwargs: Any,
) -> tuple[TrainingPlan, ...]:
    """`plan` for several kinds of hardware, with the model captured once.

    Args:
        hardware: what to plan for, one plan each.
        model, args, kwargs, num_ranks, memory_budget, stage, offload, param_dtype, kernels, compute, compress,
            recompute, reduce_dtype, accumulation, mesh, attention, tensor_parallel,
            context_parallel: as for `plan`.

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
    together = {"tensor_parallel": tensor_parallel, "context_parallel": context_parallel}
    _check_parallel(together, compute, mesh)
    check_recompute(recompute)
    if accumulation < 1:
        raise UsageError(f"accumulation must be 1 or more, not {accumulation}")
    copies = _checked_copies(mesh, num_ranks)
    num_ranks = math.prod(mesh) if mesh else num_ranks
    reduced = as_dtype_or_none(reduce_dtype, "reduce_dtype")
    tables = [_with_attention(cost_table(target, torch.device("cpu")), attention) for target in hardware]
    more = {
        "recomputes": RECOMPUTES[recompute],
        "reduce_dtype": reduced and FROM_TORCH[reduced],
        "accumulation": accumulation,
        "num_copies": copies,
        "tensor": tensor_parallel,
        "codec": planned_codec(compress, copies, tensor_parallel * context_parallel),
        "context": context_parallel,
    }
    makers = [_planner(table, num_ranks, memory_budget, offload, kernels, compute, more) for table in tables]
    captured: dict[Capability | None, LayerSamples] = {}
    num_parameters = sum(p.numel() for p in model.parameters())
    sizes = [(n, p.numel() * compute_dtype(p, dtype).itemsize) for n, p in model.named_parameters()]
    plans = []
    for make, table in zip(makers, tables, strict=True):
        kind = alike_capability(table.hardware)
        if kind not in captured:
            with chosen_attention(attention):
                captured[kind] = capture_samples(model, args, kwargs, dtype, kind)
        planner = make(captured[kind])
        found = tuple(map(planner.plan, stages))
        whole = TrainingPlan(
            type(model).__name__,
            num_parameters,
            planner.num_ranks,
            planner.costs.hardware.name,
            planner.budget,
            found,
            tensor_parallel,
            context_parallel,
        )
        if stage is None and whole.best is not None:
            refined = planner.refined(whole.best, sizes)
            whole = whole if refined is whole.best else replace(whole, stages=(*found, refined))
        plans.append(whole)
    return tuple(plans)


def _checked_copies(mesh: tuple[int, int] | None, num_ranks: int | None) -> int:
    """How many ranks hold the same shard."""
    if mesh is None:
        return 1
    if len(mesh) != 2 or not all(isinstance(size, int) and size > 0 for size in mesh):
        raise UsageError(f"mesh must be two numbers of ranks, those of copies and those of shards, not {mesh!r}")
    if num_ranks not in (None, math.prod(mesh)):
        raise UsageError(f"a mesh of {mesh[0]} x {mesh[1]} has {math.prod(mesh)} ranks, and num_ranks is {num_ranks}")
    return mesh[0]


def _with_attention(table: CostTable, kernel: str | None) -> CostTable:
    """The costs with another kernel of attention. Raises UsageError for one whose rate nobody knows."""
    known = {*TORCH_KERNELS, *table.hardware.device.attention}
    if kernel is not None and kernel not in known:
        raise UsageError(
            f"attention must be one of {', '.join(sorted(known))} on {table.hardware.name}, not {kernel!r}; a rate of "
            f"its own can be put in a profile, under [device.attention.{kernel}]"
        )
    if kernel is None or kernel == "math":
        return table
    return table.model_copy(update={"attention": kernel})


def _planner(
    costs: CostTable,
    num_ranks: int | None,
    memory_budget: int | str | None,
    offload: Offload,
    kernels: Kernels | None,
    compute: Compute | None,
    more: Mapping[str, Any],
) -> Callable[[LayerSamples], Planner]:
    """A planner for one kind of hardware, once the model is captured."""
    hardware = costs.hardware
    count = hardware.num_devices if num_ranks is None else num_ranks
    for axis in ("tensor", "context"):
        if count % (more["tensor"] * more["context"]) and more[axis] > 1:
            raise UsageError(f"{axis}_parallel={more[axis]} does not divide the {count} ranks; take a multiple of it")
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
        hints={} if hardware.has_host else {NUM_THREADS: torch.get_num_threads()},
        **more,
    )


def _check_parallel(together: Mapping[str, int], compute: Compute | None, mesh: tuple[int, int] | None) -> None:
    """Refuse what does not go with ranks that compute together."""
    for name, count in together.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise UsageError(f"{name} must be a number of ranks, 1 or more, not {count!r}")
        if count > 1 and mesh is not None:
            raise UsageError("ranks that compute together are planned for with shards over all others: leave mesh= out")
        if count > 1 and compute is not None:
            raise UsageError(f"float8 takes its scales from whole matrices: leave compute={compute!r} or {name}= out")


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
