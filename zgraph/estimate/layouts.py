"""Layouts: how many ranks compute together, and along which axes; and which of them trains on the most in a second.

Each layout is planned as `zgraph.plan` plans it, with its best stage. A layout's batch is such that every rank computes
as many rows as without: ranks that share experts have those of all of them; ranks that share sequences, or compute each
op together, have one batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from zgraph.bridge.dtypes import Dtype, as_dtype_or_none
from zgraph.bridge.target import Target, cost_table
from zgraph.cost import CostTable
from zgraph.cost.capability import alike_capability
from zgraph.errors import PlacementError, UsageError
from zgraph.estimate.layer_scaling import capture_samples
from zgraph.estimate.planners import planner_maker
from zgraph.estimate.stage_plan import Planner
from zgraph.estimate.training_plan import TrainingPlan, resting
from zgraph.options.experts import experts_of, of_all_ranks
from zgraph.options.offload import Offload
from zgraph.options.parallel import AXES, check_parallel
from zgraph.options.searched import FoundPlacements, searched, usual_inputs
from zgraph.options.settings import RECOMPUTES, Options, Recompute, device_for
from zgraph.options.validate import Kernels
from zgraph.passes import RECIPES
from zgraph.runtime.decisions import Meet, alone

__all__ = ["CompileOptions", "Parallel", "best_layout", "laid_out"]

Parallel = Literal["auto"] | TrainingPlan


class CompileOptions(Options, total=False):
    """The options of `zgraph.compile`, for type checkers."""

    parallel: Parallel | None


CLOSE = 1.02
"""Layouts within this factor of one another are as fast as can be told; the one with fewer ranks together is taken."""


@dataclass(frozen=True)
class _Tried:
    """One layout with its plan.

    Args:
        sizes: ranks along each axis of more than one, as a planner has them.
        num_items: tokens, or rows, of a step of ranks that compute together, with all its micro-batches.
        plan: what training takes; None where it cannot be.
        why: why it cannot be.
    """

    sizes: Mapping[str, int]
    num_items: int
    plan: TrainingPlan | None
    why: str = ""

    @property
    def name(self) -> str:
        if copies := self.sizes.get("num_copies"):
            return f"shards within a host, {copies} copies of them"
        return ", ".join(f"{axis}_parallel={size}" for axis, size in self.sizes.items()) or "none together"

    @property
    def items_per_s(self) -> float:
        """Items that all ranks train on in a second; 0 where it does not fit."""
        if self.plan is None or self.plan.best is None:
            return 0.0
        return 1e6 * self.num_items * self.plan.num_ranks / self.plan.together / self.plan.best.total_us

    def words(self, unit: str) -> str:
        """The layout and its speed, or why it is none."""
        if self.plan is None:
            return f"{self.name}: {self.why}"
        if self.plan.best is None:
            return f"{self.name} does not fit"
        return f"{self.name} at stage {self.plan.best.title}{resting(self.plan.best)} {self.items_per_s:,.0f} {unit}/s"


def best_layout(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    hardware: Target | CostTable | None,
    num_ranks: int | None,
    memory_budget: int | str | None = None,
    stage: int | Sequence[int] | None = None,
    offload: Offload = "auto",
    param_dtype: Dtype | None = None,
    kernels: Kernels | None = None,
    recompute: Recompute = "auto",
    accumulation: int = 1,
    alone: bool = False,
) -> TrainingPlan:
    """The plan of the layout that trains on the most items in a second among those that fit.

    Args:
        model, args, kwargs: as for `zgraph.plan`: what the forward is called with on one rank of data.
        hardware, num_ranks, memory_budget, stage, offload, param_dtype, kernels, recompute, accumulation: as there.
        alone: try no layout whose ranks compute together.

    Returns:
        Its plan, which says in `layouts` what was tried. Where nothing fits, the one that needs the least.
    """
    costs = hardware if isinstance(hardware, CostTable) else cost_table(hardware, torch.device("cpu"))
    dtype = as_dtype_or_none(param_dtype, "param_dtype")
    stages = tuple(RECIPES) if stage is None else (stage,) if isinstance(stage, int) else tuple(stage)
    more = {"tensor": 1, "context": 1, "expert": 1, "recomputes": RECOMPUTES[recompute], "accumulation": accumulation}
    capability = alike_capability(costs.hardware)
    samples = capture_samples(model, args, kwargs, dtype, capability)
    planner = planner_maker(costs, num_ranks, memory_budget, offload, kernels, None, more)(samples)
    unit, items = _items(args, kwargs)
    tried = []
    for sizes in ({},) if alone else _candidates(model, planner):
        one, times = planner, sizes.get("expert", 1)
        num_items = items * times * accumulation
        if times > 1:
            try:
                experts = experts_of(model, times)
                samples = capture_samples(model, *of_all_ranks(args, kwargs, times), dtype, capability)
            except (PlacementError, UsageError) as error:
                tried.append(_Tried(sizes, num_items, None, _reason(error)))
                continue
            one = replace(planner, samples=samples, experts=experts)
        tried.append(_planned(model, replace(one, **cast(dict[str, Any], sizes)), sizes, num_items, stages))
    found = _chosen(tried, unit)
    if found.tensor_parallel == 1:
        return found
    return replace(found, placements=placed_for(model, args, kwargs, costs, found, param_dtype))


def placed_for(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    costs: CostTable,
    plan: TrainingPlan,
    param_dtype: Dtype | None,
) -> FoundPlacements:
    """The placements of all parameters for a plan's ranks of tensor parallelism, searched with its batch.

    Args:
        model, args, kwargs: as for `zgraph.plan`.
        costs: of the hardware.
        plan: says how many ranks compute each op together.
        param_dtype: dtype to compute in.
    """
    tensor = plan.tensor_parallel
    return searched(model, tuple(args), kwargs, costs, tensor, plan.num_ranks // tensor, param_dtype)


def _items(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[str, int]:
    """The unit that a batch is counted in, and how many of them it has."""
    if isinstance(ids := kwargs.get("input_ids"), torch.Tensor):
        return "tokens", ids.numel()
    tensors = [given for given in (*args, *kwargs.values()) if isinstance(given, torch.Tensor) and given.dim()]
    return "rows", tensors[0].shape[0] if tensors else 1


def _candidates(model: nn.Module, planner: Planner) -> Iterator[dict[str, int]]:
    """Sizes of axes: none, hosts with copies of the same shards, and powers of two within a host that divide the ranks.

    The experts of a mixture are shared as wholes; to cut each of them too is not tried.
    """
    yield {}
    num_hosts, num_within = planner.costs.hardware.spread(planner.num_ranks)
    if num_hosts > 1 and num_within > 1:
        yield {"num_copies": num_hosts}
    within = min(planner.costs.hardware.devices_per_host, planner.num_ranks)
    counts = [2**n for n in range(1, 8) if 2**n <= within and planner.num_ranks % 2**n == 0]
    try:
        experts_of(model, 1)
        axes = ("expert", "context")
    except PlacementError:
        axes = ("tensor", "context")
    for axis in axes:
        yield from ({axis: count} for count in counts)


def _planned(
    model: nn.Module, planner: Planner, sizes: Mapping[str, int], num_items: int, stages: Sequence[int]
) -> _Tried:
    try:
        found = tuple(map(planner.plan, stages))
    except (PlacementError, UsageError) as error:
        return _Tried(sizes, num_items, None, _reason(error))
    plan = TrainingPlan(
        type(model).__name__,
        sum(p.numel() for p in model.parameters()),
        planner.num_ranks,
        planner.costs.hardware.name,
        planner.budget,
        found,
        tensor_parallel=sizes.get("tensor", 1),
        context_parallel=sizes.get("context", 1),
        expert_parallel=sizes.get("expert", 1),
        num_copies=sizes.get("num_copies", 1),
    )
    return _Tried(sizes, num_items, plan)


def _reason(error: Exception) -> str:
    """Words of an error, without its remedy, which is for who chose the layout."""
    return str(error).splitlines()[0].split(";")[0]


def _chosen(tried: Sequence[_Tried], unit: str) -> TrainingPlan:
    """The plan of the fastest, with what was tried in words."""
    fastest = max(one.items_per_s for one in tried)
    plans = [one for one in tried if one.plan is not None]
    if fastest:
        best = min(
            (one for one in plans if one.items_per_s * CLOSE >= fastest),
            key=lambda one: (one.plan.together if one.plan else 0, -one.items_per_s),
        )
    else:
        best = min(plans, key=lambda one: min(s.needed_bytes for s in one.plan.stages) if one.plan else 0)
    others = sorted((one for one in tried if one is not best), key=lambda one: -one.items_per_s)
    why = "the fastest that fits" if fastest else "nothing fits, and it needs the least"
    words = f"layout: {best.words(unit)}, {why}"
    if others:
        words += f"; others: {'; '.join(one.words(unit) for one in others)}"
    assert best.plan is not None, "a layout without ranks that compute together can be planned"
    return replace(best.plan, layouts=words)


def laid_out(model: nn.Module, parallel: object, options: Options, meet: Meet = alone) -> tuple[Options, str]:
    """The options of `zgraph.compile` with a layout, and what is to be said of it.

    Args:
        model: the model.
        parallel: "auto", or a plan of `zgraph.plan(parallel="auto")`.
        options: those that were given.
        meet: waits for the other ranks.

    Raises:
        PeerError: another rank found no layout.
        UsageError: they say themselves what the layout is to choose, it is for another number of ranks, nothing fits,
            or there are no inputs to plan with.
    """
    given = [key for key in ("mesh", "placements", "passes", "compute") if options.get(key) is not None]
    given += [f"{axis}_parallel" for axis in AXES if options.get(f"{axis}_parallel", 1) != 1]
    given += ["sequence_parallel"] * bool(options.get("sequence_parallel"))
    if given:
        raise UsageError(
            f"parallel= chooses the mesh and its axes: leave {'=, '.join(given)}= out, or parallel= itself"
        )
    count = dist.get_world_size() if dist.is_initialized() else 1
    if isinstance(parallel, TrainingPlan):
        found = parallel
    elif parallel == "auto":
        found = _searched(model, options, count)
        meet("search for a layout", "")  # a broadcast would wait for a rank that found none
        found = _of_first_rank(found)
    else:
        raise UsageError(f'parallel must be "auto" or a plan of zgraph.plan(parallel="auto"), not {parallel!r}')
    if found.num_ranks != count:
        raise UsageError(f"the plan of parallel= is for {found.num_ranks} ranks, and there are {count}; plan for these")
    if found.best is None:
        raise UsageError(
            f"no layout fits the memory budget of {found.budget_bytes:,} bytes: {found.reason}. {found.layouts}"
        )
    meet("layout", f"{found.num_copies} copies")
    sizes: Options = {
        "mesh": _copies(model, options, found),
        "tensor_parallel": found.tensor_parallel,
        "context_parallel": found.context_parallel,
        "expert_parallel": found.expert_parallel,
        "placements": (found.placements or "auto") if found.tensor_parallel > 1 else None,
        "stage": found.best.stage_of if found.best.whole else cast(Any, found.best.stage),
    }
    return {**options, **sizes}, found.layouts


def _copies(model: nn.Module, options: Options, plan: TrainingPlan) -> DeviceMesh | None:
    """The mesh of a plan whose hosts have copies of the same shards; None for another."""
    if plan.num_copies == 1:
        return None
    kind = device_for(model, None, options.get("device")).type
    return init_device_mesh(
        kind, (plan.num_copies, plan.num_ranks // plan.num_copies), mesh_dim_names=("replicate", "shard")
    )


def _searched(model: nn.Module, options: Options, num_ranks: int) -> TrainingPlan:
    """The best layout for this job, by the usual inputs of a language model. Raises UsageError for another model."""
    try:
        inputs = usual_inputs(model)
    except UsageError:
        raise UsageError(
            f'parallel="auto" knows no inputs of {type(model).__name__}: plan with your own, '
            f'parallel=zgraph.plan(model, batch, parallel="auto", num_ranks={num_ranks}), or give the sizes'
        ) from None
    wanted, device = options.get("stage", 3), device_for(model, None, options.get("device"))
    if not isinstance(wanted, int):
        raise UsageError("parallel= chooses one stage for all parameters; give stage= as a number, or leave it out")
    return best_layout(
        model,
        (),
        inputs,
        hardware=cost_table(options.get("hardware"), device),
        num_ranks=num_ranks,
        memory_budget=options.get("memory_budget"),
        stage=None if wanted == 3 else wanted,
        offload=options.get("offload", "auto"),
        param_dtype=options.get("param_dtype"),
        kernels=options.get("kernels"),
        recompute=options.get("recompute", "auto"),
        alone=_refuses_axes(options),
    )


def _refuses_axes(options: Options) -> bool:
    """Whether options that were given leave ranks nothing to compute together."""
    try:
        check_parallel(
            options.get("kernels") or "auto",
            options.get("offload", "auto"),
            options.get("fullgraph", True),
            options.get("dynamic"),
            None,
            has_recipe=False,
        )
    except UsageError:
        return True
    return options.get("compress") is not None


def _of_first_rank(plan: TrainingPlan) -> TrainingPlan:
    """The first rank's plan: what hosts measure of themselves differs, and all ranks must make the same mesh."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return plan
    plans = [plan]
    dist.broadcast_object_list(plans, src=0)
    return plans[0]
