"""Candidate implementations of a group, and the choice of the fastest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from zgraph.ir import Graph, Node
from zgraph.passes.core.base import Choice, Context
from zgraph.passes.fusion.rows import Group

Candidate = Literal["aten", "kernel", "inductor", "matmul", "library"]


@dataclass(frozen=True)
class Candidates:
    """Candidate implementations of a group, its matmul included: op by op; as a kernel behind it, written here or by
    Inductor; as its epilogue; or by a call of the vendor's library that does the same.

    Args:
        group: the group.
        key: what a cost table has measurements of it under: the matmul and the kernel.
        matmul: what makes an operand of the group, if it can be one kernel with it.
        nodes: for each candidate, what runs.
        graph: where the nodes' ops are known.
    """

    group: Group
    key: str
    matmul: Node | None
    nodes: Mapping[Candidate, tuple[Node, ...]]
    graph: Graph

    def best(self, context: Context, matmuls: Choice = "auto", *, only_measured: bool = False) -> Candidate:
        """The fastest: as measured, with these sizes or the nearest that were, and by the cost model elsewhere.

        With `only_measured`, ops that no measurement says more of are left for Inductor's regions, as those are that
        Inductor was the fastest for: it compiles them with what is around them.

        A kernel counts as faster than its ops there, as it moves fewer bytes of all that a step moves. Op by op can
        always be run: it is what is left where no candidate ran when they were measured.
        """
        measured = context.costs.group_us(self.key)
        if matmuls == "always" and "matmul" in self.nodes:
            return "matmul"
        if self.nodes.keys() <= measured.keys():
            fastest = min(self.nodes, key=lambda candidate: (measured[candidate], candidate != "aten"))
            return "aten" if only_measured and fastest == "inductor" else fastest
        if only_measured:
            return "aten"
        left_out: set[Candidate] = {"inductor", "aten"} if "kernel" in self.nodes else {"inductor"}
        left_out |= set() if context.costs.hardware.device.generated_matmul_rate else {"matmul", "library"}
        us = {candidate: self.us(candidate, context) for candidate in self.nodes if candidate not in left_out}
        return min(us, key=lambda candidate: us[candidate])

    def us(self, candidate: Candidate, context: Context) -> float:
        """Duration of a candidate by the cost model, in microseconds."""
        return sum(context.costs.node_us(self.graph, node, context.hints) for node in self.nodes[candidate])
