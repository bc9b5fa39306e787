"""Whether the host keeps up with a device: what it takes to launch the ops of a step, beside what they take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from zgraph.cost.memory import local_bytes, simulate_memory
from zgraph.cost.table import CostTable
from zgraph.cost.work import work
from zgraph.ir import OPS, Plan
from zgraph.ir.symbols import evaluate


@dataclass(frozen=True)
class Launches:
    """Launches of one step.

    Args:
        host_us: microseconds of the host to launch its ops one by one.
        device_us: microseconds of the device to run them at its best rates.
    """

    host_us: float
    device_us: float

    @property
    def bind(self) -> bool:
        """Whether the device waits for the host."""
        return self.host_us > self.device_us


def launches(plan: Plan, costs: CostTable, hints: Mapping[str, int]) -> Launches:
    """The launches of a plan's step, op by op, on given hardware.

    An op is launched in the time of the smallest op (`Device.launch_us`).
    """
    device, num_ops, device_s = costs.hardware.device, 0, 0.0
    for node in plan.graph.nodes:
        if node.op in OPS and OPS[node.op].lane != "compute":
            continue
        done = work(plan.graph, node)
        flop, num_bytes = evaluate(done.flop, hints), evaluate(done.num_bytes, hints)
        num_ops += bool(flop or num_bytes)
        computing = flop / device.rate(done.dtype) if flop else 0.0
        device_s += max(computing, num_bytes / device.memory_bytes_per_s)
    return Launches(device.launch_us * num_ops, 1e6 * device_s)


def recorded_bytes(plan: Plan, hints: Mapping[str, int]) -> int:
    """Bytes that recordings of a plan keep, at most: they give nothing back, and what waits for the backward has memory
    that the backward does not get.
    """
    saved = sum(local_bytes(value.type, plan.graph.mesh, hints) for value in plan.saved)
    return simulate_memory(plan, hints).peak.total_bytes + saved
