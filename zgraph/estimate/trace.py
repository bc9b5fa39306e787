"""A model's graph and what the passes make of it, for hardware that is not here, as a run file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from zgraph.bridge.dtypes import Dtype, as_dtype_or_none
from zgraph.bridge.target import Target, cost_table, num_bytes, planned_budget
from zgraph.capture.deep import capture_deep
from zgraph.certify.certificate import Certifier
from zgraph.cost.capability import capability_of
from zgraph.cost.rest import at_rest
from zgraph.environment import environment
from zgraph.errors import UsageError
from zgraph.ir import Axis, Graph, OutputKind
from zgraph.options.experts import of_all_ranks
from zgraph.options.parallel import AXIS, CONTEXT, EXPERT, cuts_of
from zgraph.options.parallel import at_rest as at_rest_over
from zgraph.passes import Context, Pipeline
from zgraph.passes.partition import Partition
from zgraph.passes.place import Place
from zgraph.runfile.format import Provenance, Recording, RunFile
from zgraph.runfile.sources import sources_of


def traced(
    model: nn.Module,
    inputs: Mapping[str, Any],
    pipeline: Pipeline,
    *,
    hardware: Target,
    num_ranks: int | None = None,
    memory_budget: int | str | None = None,
    param_dtype: Dtype | None = None,
    tensor_parallel: int = 1,
    context_parallel: int = 1,
    expert_parallel: int = 1,
) -> RunFile:
    """Capture a model under fake tensors, as the hardware will run it, and run passes on it.

    Args:
        model: on the meta device, or any other; it is not changed.
        inputs: what its forward is called with on one rank, by name.
        pipeline: the passes.
        hardware: what to plan for, as in `zgraph.plan`.
        num_ranks: by default all devices of the hardware.
        memory_budget: bytes of one rank; by default the device's memory less a margin.
        param_dtype: dtype to compute in.
        tensor_parallel, context_parallel, expert_parallel: ranks that compute together, as in `zgraph.compile`; the
            pipeline places along these axes.

    Raises:
        PlacementError, UsageError, HardwareError, CaptureError, GraphBreakError, BudgetError: as `zgraph.plan` and the
            passes do.
    """
    costs = cost_table(hardware, torch.device("cpu"))
    count = costs.hardware.num_devices if num_ranks is None else num_ranks
    if count < 1:
        raise UsageError(f"num_ranks must be 1 or more, not {count}")
    budget = planned_budget(costs.hardware, count) if memory_budget is None else num_bytes(memory_budget)
    dtype = as_dtype_or_none(param_dtype, "param_dtype")
    _, inputs = of_all_ranks((), inputs, expert_parallel)
    graph, how = capture_deep(model, inputs, dtype, capability_of(costs.hardware))
    sizes = {AXIS: tensor_parallel, CONTEXT: context_parallel, EXPERT: expert_parallel}
    if count % (together := math.prod(sizes.values())):
        raise UsageError(f"{together} ranks that compute together do not divide {count} ranks; take a multiple of them")
    model_axes = tuple(Axis(name, size) for name, size in sizes.items() if size > 1)
    mesh = (*model_axes, Axis("shard", count // together)) if count > 1 else ()
    graph = _cut(graph, model, pipeline, sizes, count // together)
    context = Context(mesh=mesh, costs=costs, memory_budget=budget, groups_calls=True, keeps_blocks=True)
    context = _resting(graph, pipeline, context)
    recording = Recording(graph, sources=sources_of(graph))
    level = environment().verify
    certifier = Certifier(graph, context, thorough=level == 2)
    pipeline.run(graph, context, [recording, certifier])
    made = Provenance(model=type(model).__name__, torch=torch.__version__, captured=how)
    return recording.run_file(made, context, certifier.finish() if level else None)


def _cut(graph: Graph, model: nn.Module, pipeline: Pipeline, sizes: Mapping[str, int], num_shards: int) -> Graph:
    """The graph with its parameters cut along the axes along which ranks compute together, by the model's plan."""
    stage = next((step.stage for step in pipeline.passes if isinstance(step, Partition)), 0)
    cuts = cuts_of(model, None, sizes["tensor"], num_shards)
    cuts = at_rest_over(model, cuts, sizes, lambda _: stage)
    return replace(graph, inputs=tuple(replace(i, cuts=cuts.get(i.target, i.cuts)) for i in graph.inputs))


def _resting(graph: Graph, pipeline: Pipeline, context: Context) -> Context:
    """The context with what one rank holds between steps: masters, AdamW's moments of them, and buffers; and what
    AdamW's step takes above: the gradients, and as much again."""
    placing = [step for step in pipeline.passes if isinstance(step, Partition | Place)]
    placed = Pipeline(tuple(placing)).run(graph, context)
    trained = {o.target for o in placed.outputs if o.kind is OutputKind.grad and o.value is not None}
    updated = replace(placed, inputs=tuple(i for i in placed.params if i.value.name in trained))
    found = at_rest(placed)
    return replace(
        context,
        rest_bytes=found["masters"] + found["optimizer"] + found["buffers"],
        update_bytes=at_rest(updated)["optimizer"],
    )
