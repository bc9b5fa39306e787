"""Remedies where launching ops takes the host longer than running them takes the device: programs are recorded for the
GPU to repeat (CUDA graphs), and regions become libraries of C++.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from zgraph.bridge.private_aot import libraries_problem
from zgraph.cost import CostTable
from zgraph.cost.launches import Launches, launches, recorded_bytes
from zgraph.ir import Plan
from zgraph.options.validate import CudaGraphs, RegionCalls
from zgraph.passes import Context
from zgraph.runtime import Session
from zgraph.runtime.arenas import most_bytes
from zgraph.runtime.libraries import Libraries
from zgraph.runtime.regions import Regions
from zgraph.runtime.replays import Replays


class Recordings:
    """The recordings of one plan, or why there are none.

    Args:
        plan: the plan.
        session: what it works on.
        context: of the passes, with sizes to plan for.
        wanted: whether there shall be recordings; "auto" has them where the device would wait for the host.
        kept_before: bytes that recordings of other plans of the model keep.
        caches: memory that the forward is given in each call and writes to, by the name of its value.
    """

    def __init__(
        self,
        plan: Plan,
        session: Session,
        context: Context,
        wanted: CudaGraphs,
        kept_before: int = 0,
        caches: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> None:
        self.plan, self.session, self.caches = plan, session, caches
        self.replays: Replays | None = None
        self.num_bytes = recorded_bytes(plan, context.hints)
        self.problem = ""
        bound = launches(plan, context.costs, context.hints)
        self.compared = _compared(bound, context.costs)
        if wanted == "auto" and not bound.bind:
            self.problem = f"none: {self.compared}, so that the device would not wait"
        elif missing := _missing_bytes(kept_before + self.num_bytes, plan, context):
            self.problem = (
                f"none: they would keep {_mib(self.num_bytes)}, {_mib(missing)} more than the budget has room for"
            )

    @property
    def maker(self) -> Callable[[Mapping[str, Any]], Replays] | None:
        """Function that makes them, of the memory of parameters and constants; None where there are to be none."""
        return None if self.problem else self._make

    @property
    def kept_bytes(self) -> int:
        """Bytes that they keep between steps, at most."""
        return 0 if self.problem else self.num_bytes

    def _make(self, resident: Mapping[str, Any]) -> Replays:
        plan, session = self.plan, self.session
        most = most_bytes(plan)
        arena = session.arenas.keep(most) if most else None
        self.replays = Replays(session.device, plan, resident, session.arenas.turns, arena, self.caches)
        return self.replays

    def forget(self) -> None:
        """Forget what was recorded, as memory that it reads has moved: it is recorded anew."""
        if self.replays is not None:
            self.replays.forget()

    def __str__(self) -> str:
        found = self.problem or f"{self.replays}; {self.compared}; they keep at most {_mib(self.num_bytes)}"
        return f"{self.plan.graph.name}: {found}"


def choose_calls(regions: Regions, plan: Plan, context: Context, wanted: RegionCalls, device: torch.device) -> None:
    """Have regions of a plan that are new become libraries of C++: "auto" where launching takes longer than running, on
    processors, with a torch that makes them.
    """
    problem = libraries_problem() if device.type == "cpu" else f"they are for processors, and this is {device}"
    if wanted == "auto" and problem:
        regions.makes_libraries = False
        regions.remark = f"{plan.graph.name}: no libraries of C++, as {problem}"
        return
    bound = launches(plan, context.costs, context.hints)
    if wanted == "c++" or (wanted == "auto" and bound.bind):
        regions.libraries = regions.libraries or Libraries()
        regions.makes_libraries = True
    else:
        regions.makes_libraries = False
        regions.remark = f"{plan.graph.name}: no libraries of C++, as {_compared(bound, context.costs)}"


def _compared(bound: Launches, costs: CostTable) -> str:
    host, device = bound.host_us / 1e3, bound.device_us / 1e3
    return f"by the figures of {costs.hardware.name} the host launches in {host:.1f} ms what takes {device:.1f} ms"


def _missing_bytes(num_bytes: int, plan: Plan, context: Context) -> int:
    """Bytes that the budget has too few of for recordings beside what is at rest and the optimizer's step."""
    if context.memory_budget is None:
        return 0
    update_bytes = context.update_bytes if plan.backward is not None else 0
    return max(context.rest_bytes + num_bytes + update_bytes - context.memory_budget, 0)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
