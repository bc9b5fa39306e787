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
    kernels = {costs.attention or kernel for n in graph.nodes if (kernel := attention_kernel(n))}
    known = costs.hardware.device.attention
    return costs.hardware.error.time(
        us,
        num_ranks=num_ranks(graph.mesh),
        sequence=longest_sequence(graph, hints),
        is_known=all(kernel in known for kernel in kernels),
    )


def longest_sequence(graph: Graph, hints: Mapping[str, int]) -> int:
    """Keys of the longest attention of a graph, by the last node of each op; 0 where it has none."""
    last = {node.op: node for node in graph.nodes if attention_kernel(node)}
    return max((int(evaluate(work(graph, node).size, hints)) for node in last.values()), default=0)


def memory_interval(num_bytes: int, costs: CostTable) -> Interval:
    """Interval of a peak in bytes."""
    return costs.hardware.error.memory(num_bytes)
