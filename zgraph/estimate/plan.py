"""`zgraph.plan`: what training a model takes on hardware that is not here, stage by stage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from zgraph.bridge.aten import FROM_TORCH, compute_dtype
from zgraph.bridge.dtypes import Dtype, as_dtype_or_none
from zgraph.bridge.private_gpu import TORCH_KERNELS, Capability, chosen_attention
from zgraph.bridge.target import Target, cost_table
from zgraph.cost import CostTable
from zgraph.cost.capability import alike_capability
from zgraph.errors import UsageError
from zgraph.estimate.layer_scaling import LayerSamples, capture_samples
from zgraph.estimate.layouts import best_layout, placed_for
from zgraph.estimate.planners import planner_maker
from zgraph.estimate.training_plan import TrainingPlan
from zgraph.options.compression import Compress, planned_codes
from zgraph.options.experts import experts_of, of_all_ranks
from zgraph.options.model_plans import Placements
from zgraph.options.offload import Offload
from zgraph.options.parallel import cuts_of
from zgraph.options.searched import FoundPlacements
from zgraph.options.settings import RECOMPUTES, Recompute, check_recompute
from zgraph.options.validate import Compute, Kernels, check_compute, check_kernels
from zgraph.passes import RECIPES


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
    expert_parallel: int = 1,
    placements: Placements | None = None,
    parallel: Literal["auto"] | None = None,
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
        compress: codecs, "auto" or "exact", as in `zgraph.compile`; what codes leave out, and copies that codes
            change, count as optimizer state.
        recompute: what is computed again, as in `zgraph.compile`.
        reduce_dtype: dtype in which gradients are averaged over ranks, as in `zgraph.compile`.
        accumulation: micro-steps of a step; all but the last are under `zgraph.no_sync`.
        mesh: ranks that hold the same shard, and ranks that parameters are sharded over; their product is `num_ranks`.
        attention: the kernel that attention runs as: "math", "efficient", "flash" or "cudnn", which torch can be told
            to take, and where the profile has its rate another, such as "flash3" or "triton". By default what torch
            takes on the hardware.
        tensor_parallel: ranks that compute each op together, with the same batch.
        placements: how they cut parameters, as in `zgraph.compile`; by default searched for, as
            `zgraph.search_placements` does. `zgraph.compile(model, parallel=found)` takes them from the plan.
        context_parallel: ranks that share each sequence, as in `zgraph.compile`.
        expert_parallel: ranks that share the experts, each with a batch of its own, as in `zgraph.compile`.
        parallel: "auto" tries ranks that compute together along each axis, and gives the plan with which all ranks
            train on the most in a second; `zgraph.compile(model, parallel=found)` takes it.

    Raises:
        UsageError, DtypeError: an option means nothing.
        PlacementError: sequences, heads, rows or experts do not divide.
        HardwareError: there is no such hardware, or the ranks do not fill its hosts.
        CaptureError, GraphBreakError: as `zgraph.compile` does at the first call.
    """
    if parallel is not None:
        if placements is not None:
            raise UsageError(
                'parallel="auto" searches for placements: leave placements= out, or give the sizes of axes'
            )
        _check_chooses(parallel, mesh, compute, compress, tensor_parallel, context_parallel, expert_parallel)
        with chosen_attention(attention):
            return best_layout(
                model,
                args,
                kwargs,
                hardware=_with_attention(cost_table(hardware, torch.device("cpu")), attention),
                num_ranks=num_ranks,
                memory_budget=memory_budget,
                stage=stage,
                offload=offload,
                param_dtype=param_dtype,
                kernels=kernels,
                recompute=recompute,
                accumulation=accumulation,
            )
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
        expert_parallel=expert_parallel,
        placements=placements,
        **kwargs,
    )
    if tensor_parallel == 1:
        return found
    if placements is None or isinstance(placements, str):
        table = cost_table(hardware, torch.device("cpu"))
        return replace(found, placements=placed_for(model, args, kwargs, table, found, param_dtype))
    return replace(found, placements=placements)


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
    expert_parallel: int = 1,
    placements: Placements | None = None,
    best_only: bool = False,
    **kwargs: Any,
) -> tuple[TrainingPlan, ...]:
    """`plan` for several kinds of hardware, with the model captured once.

    Args:
        hardware: what to plan for, one plan each.
        best_only: leave stages out that do not fit or are slower, where one fits: that is quicker.
        model, args, kwargs, num_ranks, memory_budget, stage, offload, param_dtype, kernels, compute, compress,
            recompute, reduce_dtype, accumulation, mesh, attention, tensor_parallel,
            context_parallel, expert_parallel, placements: as for `plan`.

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
    together = {
        "tensor_parallel": tensor_parallel,
        "context_parallel": context_parallel,
        "expert_parallel": expert_parallel,
    }
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
        "codes": planned_codes(compress, stages, math.prod(together.values())),
        "context": context_parallel,
        "expert": expert_parallel,
        "experts": experts_of(model, expert_parallel) if expert_parallel > 1 else frozenset(),
        **_stated(model, placements, tensor_parallel),
    }
    makers = [planner_maker(table, num_ranks, memory_budget, offload, kernels, compute, more) for table in tables]
    captured: dict[Capability | None, LayerSamples] = {}
    num_parameters = sum(p.numel() for p in model.parameters())
    sizes = [(n, p.numel() * compute_dtype(p, dtype).itemsize) for n, p in model.named_parameters()]
    plans = []
    for make, table in zip(makers, tables, strict=True):
        kind = alike_capability(table.hardware)
        if kind not in captured:
            with chosen_attention(attention):
                captured[kind] = capture_samples(model, *of_all_ranks(args, kwargs, expert_parallel), dtype, kind)
        planner = make(captured[kind])
        found = planner.plans(stages, best_only=best_only)
        whole = TrainingPlan(
            type(model).__name__,
            num_parameters,
            planner.num_ranks,
            planner.costs.hardware.name,
            planner.budget,
            found,
            tensor_parallel,
            context_parallel,
            expert_parallel,
            copies,
        )
        if stage is None and whole.best is not None:
            refined = planner.refined(whole.best, sizes)
            whole = whole if refined is whole.best else replace(whole, stages=(*found, refined))
        plans.append(whole)
    return tuple(plans)


def _stated(model: nn.Module, placements: Placements | None, num_ranks: int) -> dict[str, Any]:
    """Arguments of a planner for placements that are not searched for."""
    if placements is None or placements == "auto":
        if placements is not None and num_ranks == 1:
            raise UsageError("placements= says how parameters are cut; give tensor_parallel= too")
        return {}
    cuts = cuts_of(model, placements, num_ranks, 1)
    searches = "values" if isinstance(placements, FoundPlacements) else ""
    return {"searches": searches, "placed": {name: place for name, ((_, place),) in cuts.items()}}


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


def _check_chooses(parallel: object, mesh: object, compute: object, compress: object, *sizes: int) -> None:
    """Refuse what a search for a layout does not try, or chooses."""
    if parallel != "auto":
        raise UsageError(f'parallel must be "auto" or None, not {parallel!r}')
    if any(size != 1 for size in sizes) or mesh is not None:
        raise UsageError('parallel="auto" chooses the ranks along each axis: leave their sizes and mesh= out')
    if compute is not None or compress is not None:
        raise UsageError('parallel="auto" plans without float8 and codecs: leave compute= and compress= out')


def _check_parallel(together: Mapping[str, int], compute: Compute | None, mesh: tuple[int, int] | None) -> None:
    """Refuse what does not go with ranks that compute together."""
    for name, count in together.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise UsageError(f"{name} must be a number of ranks, 1 or more, not {count!r}")
        if count > 1 and mesh is not None:
            raise UsageError("ranks that compute together are planned for with shards over all others: leave mesh= out")
        if count > 1 and compute is not None:
            raise UsageError(f"float8 takes its scales from whole matrices: leave compute={compute!r} or {name}= out")
