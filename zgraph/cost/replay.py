"""A plan's clock run again at other costs, in a part of the time that a simulation takes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace

from zgraph.cost.table import CostTable
from zgraph.ir import OPS, Graph, Node, Plan, Value
from zgraph.ir.op_rows import LANES


@dataclass(frozen=True)
class Replay:
    """Record of a plan, to run the clock again at other costs: each kind of node once, and their order.

    Args:
        graph: of the plan.
        hints: a number for each symbolic size.
        nodes: of the compute lane and starts, one of each signature, type of result and kind of transfer.
        steps: for each instruction its lane, the number of its node in `nodes`, and of the future that it starts or
            waits for; -1 where there is none.
    """

    graph: Graph
    hints: Mapping[str, int]
    nodes: tuple[Node, ...]
    steps: tuple[tuple[str, int, int], ...]

    @classmethod
    def of(cls, plan: Plan, hints: Mapping[str, int]) -> Replay:
        """The replay of a training step, as `simulate` runs it."""
        instructions = list(plan.forward.instructions)
        if plan.backward is not None:
            instructions += (plan.loss_only[0] if plan.loss_only else plan.backward).instructions
        nodes: dict[object, tuple[int, Node]] = {}
        futures: dict[str, int] = {}
        steps = []
        for instruction in instructions:
            node = instruction.node
            future = -1
            if node.op == "wait":
                future = futures[node.operands[0].name]
            elif instruction.lane != "compute":
                future = len(set(futures.values()))
                futures.update(dict.fromkeys((r.name for r in node.results), future))
            key = node.op, _kinds(node.args), _kinds(node.kwargs), tuple(r.type for r in node.results)
            number = nodes.setdefault(key, (len(nodes), node))[0]
            steps.append((instruction.lane, number, future))
        return cls(replace(plan.graph, nodes=()), hints, tuple(node for _, node in nodes.values()), tuple(steps))

    def step_us(self, costs: CostTable) -> float:
        """The step's time, as `simulate` gives it."""
        hints, slowdown = self.hints, costs.hardware.overlap_slowdown
        cost = [self._us(costs, node) for node in self.nodes]
        now, over = 0.0, dict[int, float]()
        free: dict[str, float] = dict.fromkeys(LANES, 0.0)
        for lane, number, future in self.steps:
            if lane != "compute":
                now += costs.start_us(self.nodes[number], hints)
                free[lane] = over[future] = max(now, free[lane]) + cost[number]
            elif future >= 0:
                now = max(now, over[future])
            elif us := cost[number]:
                overlapped = min(max(max(free.values()) - now, 0.0) / slowdown, us)
                now += us + overlapped * (slowdown - 1)
        return now

    def _us(self, costs: CostTable, node: Node) -> float:
        if node.op in OPS and OPS[node.op].lane != "compute":
            return costs.transfer_us(self.graph, node, self.hints)
        return 0.0 if node.op == "wait" else costs.node_us(self.graph, node, self.hints)


def _kinds(arg: object) -> Hashable:
    """An argument with the types of values in the place of the values."""
    if isinstance(arg, Value):
        return arg.type
    return tuple(map(_kinds, arg)) if isinstance(arg, tuple) else arg
