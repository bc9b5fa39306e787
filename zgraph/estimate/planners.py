"""Planners for one kind of hardware."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from zgraph.bridge.scratch import measured_scratch
from zgraph.bridge.target import MEMORY_MARGIN, num_bytes, planned_budget
from zgraph.cost import CostTable
from zgraph.cost.capability import planned_library_bytes
from zgraph.cost.reserved import beside_bytes
from zgraph.cost.workspace import NUM_THREADS
from zgraph.environment import has_expandable_segments
from zgraph.errors import UsageError
from zgraph.estimate.layer_scaling import LayerSamples
from zgraph.estimate.stage_plan import Planner
from zgraph.options.offload import Offload, activations, places
from zgraph.options.validate import Compute, Kernels, default_kernels

__all__ = ["planner_maker"]


def planner_maker(
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
    for axis in ("tensor", "context", "expert"):
        if count % (more["tensor"] * more["context"] * more["expert"]) and more[axis] > 1:
            raise UsageError(f"{axis}_parallel={more[axis]} does not divide the {count} ranks; take a multiple of it")
    budget = planned_budget(hardware, count) if memory_budget is None else num_bytes(memory_budget)
    is_whole = hardware.has_host and memory_budget is None
    room_bytes = hardware.device.memory_bytes - beside_bytes(count) if is_whole else None
    host_bytes = hardware.host_memory_bytes * (1 - MEMORY_MARGIN) / hardware.spread(count)[1]

    def planner(samples: LayerSamples) -> Planner:
        hints = {} if hardware.has_host else {NUM_THREADS: torch.get_num_threads()}
        if hints:
            for graph in samples.members:
                hints |= measured_scratch(graph, hints)
        return Planner(
            samples,
            num_ranks=count,
            costs=costs,
            budget=budget,
            host_budget=int(host_bytes) or None,
            places=places(offload, is_gpu=hardware.has_host),
            moves=activations(offload, budget, is_gpu=hardware.has_host) != "never",
            kernels=kernels or default_kernels(is_gpu=hardware.has_host),
            compute=compute,
            hints=hints,
            expandable=has_expandable_segments(),
            room_bytes=room_bytes,
            library_bytes=planned_library_bytes(hardware),
            **more,
        )

    return planner
