"""Intervals of a graph's predictions, wider where it goes beyond what was published for its hardware."""

from __future__ import annotations

from collections.abc import Mapping

from zgraph.cost.accuracy import Interval
from zgraph.cost.table import CostTable
from zgraph.cost.work import attention_kernel, work
from zgraph.ir import Graph, num_ranks
from zgraph.ir.symbols import evaluate


def time_interval(us: float, graph: Graph, costs: CostTable, hints: Mapping[str, int]) -> Interval:
    """Interval of a step's time in microseconds.

    Args:
        us: as predicted.
        graph: of the step, with the mesh that it runs on.
        costs: that it was predicted with.
        hints: a number for each symbolic size.
    """
    kernels = {n.op: (costs.attention or kernel, n) for n in graph.nodes if (kernel := attention_kernel(n))}
    longest = max((evaluate(work(graph, n).size, hints) for _, n in kernels.values()), default=0)
    known = costs.hardware.device.attention
    return costs.hardware.error.time(
        us,
        num_ranks=num_ranks(graph.mesh),
        sequence=int(longest),
        is_known=all(kernel in known for kernel, _ in kernels.values()),
    )


def memory_interval(num_bytes: int, costs: CostTable) -> Interval:
    """Interval of a peak in bytes."""
    return costs.hardware.error.memory(num_bytes)
