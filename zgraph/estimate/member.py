"""One graph of a model's samples at one stage: its memory, and the time of its micro-steps."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from zgraph.cost import AlphaBeta, CostTable, Moment, simulate
from zgraph.cost.memory import local_bytes
from zgraph.cost.table import moved
from zgraph.cost.work import work
from zgraph.ir import OPS, Graph, Node, Phase, Plan
from zgraph.ir.ranked_rows import ROUNDS
from zgraph.passes import Context, Pass, Pipeline, make_plan
from zgraph.passes.analysis.forward import Forward
from zgraph.passes.analysis.lookahead import step_memory
from zgraph.passes.fit import Fit
from zgraph.passes.offload import Saved
from zgraph.passes.plan.zero_tangents import without_tangents, zero_tangents


class Member:
    """One graph of the samples at one stage, with all blocks keeping what is worth a price."""

    def __init__(self, graph: Graph, passes: tuple[Pass, ...], context: Context) -> None:
        self.context = context
        at = next(i for i, step in enumerate(passes) if step.name == Fit.name)
        self.tail = Pipeline(passes[at + 1 :])
        self.placed = Pipeline(passes[:at]).run(graph, context)
        self.forward = Forward(self.placed, context)
        self._kept_at: dict[float, Graph] = {}
        self._computing_us: dict[float | None, float] = {}
        self.plans: dict[tuple[float | None, float, int], Plan] = {}

    @cached_property
    def flop(self) -> float:
        """FLOP of a step in which nothing is computed again."""
        return float(sum(work(self.placed, node).flop for node in self.placed.nodes))

    @cached_property
    def kept(self) -> Graph:
        """The graph that keeps all but what the user marked under `torch.utils.checkpoint`."""
        is_marked = any(node.checkpoint for node in self.placed.nodes)
        return self.forward.keeping(self.forward.choices(None)) if is_marked else self.placed

    def kept_at(self, us_per_byte: float | None) -> Graph:
        """The graph that keeps what is worth a price; at none, all but what the user marked."""
        if us_per_byte is None:
            return self.kept
        if us_per_byte not in self._kept_at:
            self._kept_at[us_per_byte] = self.forward.keeping(self.forward.choices_at(us_per_byte))
        return self._kept_at[us_per_byte]

    def kept_bytes(self, us_per_byte: float | None) -> int:
        """Bytes that the forward keeps at a price."""
        forward = self.forward
        choices = forward.choices(None) if us_per_byte is None else forward.choices_at(us_per_byte)
        return sum(choice.num_bytes for choice in choices)

    def computing_us(self, us_per_byte: float | None) -> float:
        """Microseconds that the ops of a micro-step take at a price, but for what a loss alone spares."""
        if us_per_byte not in self._computing_us:
            graph, context = self.kept_at(us_per_byte), self.context
            graph = without_tangents(graph, zero_tangents(graph)) or graph
            us = sum(context.costs.node_us(graph, node, context.hints) for node in graph.nodes)
            self._computing_us[us_per_byte] = us
        return self._computing_us[us_per_byte]

    @cached_property
    def accumulated_bytes(self) -> int:
        """Bytes of the gradients that a micro-step leaves under no_sync."""
        unsynced = make_plan(self.tail.run(self.placed, self.context)).unsynced
        results = unsynced.results if unsynced else ()
        return sum(local_bytes(value.type, self.context.mesh, {}) for value in results if value is not None)

    def graph(self, us_per_byte: float | None, moved_share: float) -> Graph:
        """The placed graph without what the user marked to be computed again; at a price, without what is not worth its
        bytes; with a share of the rest on the host.
        """
        kept = self.kept_at(us_per_byte)
        if not moved_share:
            return kept
        saved = Saved(kept, self.context)
        return saved.offloading(saved.first(int(moved_share * sum(saved.num_bytes.values()))))

    def peaks(self, us_per_byte: float | None, moved_share: float) -> tuple[tuple[Moment, Moment], int]:
        """The highest moments before the backward reaches the first layer, and after; the most bytes on the host."""
        graph = self.graph(us_per_byte, moved_share)
        curve = step_memory(graph, self.context)
        moments = curve.moments
        layers = {n.name: n.origin.module for n in graph.nodes if n.phase is Phase.backward}
        first = next(
            (i for i, m in enumerate(moments) if m.phase == "bwd" and ".0." in f"{layers.get(m.node, '')}."),
            len(moments),
        )
        before, after = moments[:first] or moments, moments[first:] or moments
        return (_highest(before), _highest(after)), curve.host_peak_bytes

    def plan(self, us_per_byte: float | None, moved_share: float, num_micro: int) -> Plan:
        """The scheduled step, with the programs of micro-steps that do not sync where there are several."""
        key = us_per_byte, moved_share, num_micro
        if key not in self.plans:
            scheduled = self.tail.run(self.graph(us_per_byte, moved_share), self.context)
            self.plans[key] = make_plan(scheduled, only_step=num_micro == 1)
        return self.plans[key]

    def figures(
        self, us_per_byte: float | None, moved_share: float, num_micro: int
    ) -> tuple[float, float, float, float]:
        """Microseconds of a step's micro-steps and of what is exposed, bytes sent, and FLOP of one micro-step."""
        whole = self.plan(us_per_byte, moved_share, num_micro)
        flop = sum(work(whole.graph, n).flop for n in whole.graph.nodes)
        last = _simulated(whole, self.context, self.context.costs)
        if num_micro == 1:
            return *last, flop
        early = self._early(whole)
        return *(at_last + (num_micro - 1) * before for at_last, before in zip(last, early, strict=True)), flop

    def _early(self, whole: Plan) -> tuple[float, float, float]:
        """The same of a micro-step under no_sync that is not the first: parameters that are whole from the forward to
        the end of the step are there.
        """
        both = whole.loss_only and (whole.loss_only[1], whole.loss_only[1])
        unsynced = replace(whole, backward=whole.unsynced, loss_only=both)
        if any(_gathers(node) for node in unsynced.graph.nodes if node.phase is Phase.backward):
            return _simulated(unsynced, self.context, self.context.costs)
        free = AlphaBeta(latency_us=0, bytes_per_s=sys.float_info.max)
        costs = self.context.costs
        costs = costs.model_copy(update={"transfers": {**costs.transfers, "all_gather": free}})
        return _simulated(unsynced, self.context, costs, gathers=False)


def _gathers(node: Node) -> bool:
    return node.op in OPS and OPS[node.op].lane == "comm" and moved(node).name == "all_gather"


def _simulated(plan: Plan, context: Context, costs: CostTable, *, gathers: bool = True) -> tuple[float, float, float]:
    """Microseconds of a micro-step and of what is exposed of it, and bytes sent; `gathers` says whether it gathers."""
    timeline = simulate(plan, costs, context.hints)
    started = {span.node for span in timeline.spans if span.lane == "comm"}
    nodes = [node for node in plan.collectives if node.name in started and (gathers or not _gathers(node))]
    nodes += [node for node in plan.graph.nodes if node.op in ROUNDS]
    sent = sum(OPS[node.op].wire_bytes(node, plan.graph.mesh) for node in nodes)
    return timeline.step_us, timeline.exposed_us, sent


def _highest(moments: Sequence[Moment]) -> Moment:
    return max(moments, key=lambda m: m.total_bytes)
