"""Move values that the backward needs to the host's memory while nothing reads them.

    fwd %h = aten.mm.default(%x, %w)               fwd %h = aten.mm.default(%x, %w)
    fwd %y = aten.silu.default(%h)                 fwd %y = aten.silu.default(%h)
    ...                                      ->    fwd %h_host = reshard(%h)               (f32[8, 64]@host)
                                                   ...
                                                   bwd %h_back = reshard(%h_host)
    bwd %dh = aten.silu_backward.default(%d, %h)   bwd %dh = aten.silu_backward.default(%d, %h_back)

The value that the forward made first goes first: it is read last, so both copies have the most time to hide in. Views
are taken again of the value that came back. The pass `fit` does this for a memory budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from zgraph.cost.memory import local_bytes
from zgraph.ir import HOST, Builder, Graph, Node, Phase, TensorType, Value
from zgraph.ir.aliases import Memory
from zgraph.ir.graph import values_in
from zgraph.ir.ops import OPS, views
from zgraph.passes.analysis.forward import Forward
from zgraph.passes.analysis.gathers import is_gather
from zgraph.passes.core.base import Context, Pass


@dataclass(frozen=True)
class Offload(Pass):
    """Move values that the backward needs to the host's memory while nothing reads them.

    Args:
        num_bytes: at most so much is moved. 0 moves nothing.
        min_bytes: smaller values stay. 0 leaves it to the costs: a copy must take longer than its latency.
    """

    num_bytes: int = 0
    min_bytes: int = 0

    name: ClassVar[str] = "offload"
    requires: ClassVar[frozenset[str]] = frozenset({"placed"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"lowered"})

    def __post_init__(self) -> None:
        if self.num_bytes < 0 or self.min_bytes < 0:
            raise ValueError("num_bytes and min_bytes must be 0 or more")

    def run(self, graph: Graph, context: Context) -> Graph:
        if not self.num_bytes:
            return graph
        saved = Saved(graph, context, self.min_bytes)
        return saved.offloading(saved.first(self.num_bytes))


class Saved:
    """The values of a forward that wait for the backward and could do so on the host.

    Args:
        graph: a placed graph, not lowered yet.
        context: costs, and sizes for symbols.
        min_bytes: smaller values stay on the device; 0 leaves it to the costs.
    """

    def __init__(self, graph: Graph, context: Context, min_bytes: int = 0) -> None:
        self.graph, self.context = graph, context
        self.min_bytes = min_bytes or int(context.costs.latency_bytes)

    @cached_property
    def memory(self) -> Memory:
        return Memory(self.graph)

    @cached_property
    def num_bytes(self) -> dict[Value, int]:
        """The bytes of each value, small ones too, in the order in which the forward makes them."""
        graph, hints = self.graph, self.context.hints
        return {v: local_bytes(v.type, graph.mesh, hints) for v in self._candidates()}

    @property
    def values(self) -> list[Value]:
        return [v for v, num_bytes in self.num_bytes.items() if num_bytes >= self.min_bytes]

    def first(self, num_bytes: int) -> list[Value]:
        """The values that the forward makes first, as many as fit into `num_bytes`."""
        found, left = [], num_bytes
        for value in self.values:
            if self.num_bytes[value] <= left:
                left -= self.num_bytes[value]
                found.append(value)
        return found

    def _candidates(self) -> list[Value]:
        """Memory of its own that the forward makes, does not return, nothing writes to, and the backward reads."""
        graph, memory = self.graph, self.memory
        read = {
            root
            for node in graph.nodes
            if node.phase is not Phase.forward
            for value in node.operands
            for root in memory.roots(value.name)
        }
        fixed = {root for name in graph.output_names for root in memory.roots(name)}
        for node in graph.nodes:
            if node.op not in OPS:
                written = values_in(tuple(node.args[i] for i in graph.foreign[node.op].writes))
                fixed.update(root for value in written for root in memory.roots(value.name))
        return [
            result
            for node in graph.phase_nodes(Phase.forward)
            if not views(graph, node) and not is_gather(graph, node)
            for result in node.results
            if isinstance(result.type, TensorType)
            and not result.type.is_on_host
            and not result.type.is_sharded
            and not result.type.future
            and (root := self.root(node, result)) in read
            and root not in fixed
        ]

    def root(self, node: Node, result: Value) -> str:
        """The name of the memory that a node makes for a result: of what is waited for, the start's."""
        return node.operands[0].name if node.op == "wait" else result.name

    def offloading(self, values: Sequence[Value]) -> Graph:
        """The graph in which these values wait for the backward on the host."""
        if not values:
            return self.graph
        roots = {v.name: self.root(self.graph.producers[v.name], v) for v in values}
        graph = self._with_own_views(set(roots.values()))
        memory, builder = Memory(graph), Builder(graph, Offload.name)
        last: dict[str, int] = {}
        for position, node in enumerate(graph.nodes):
            if node.phase is Phase.forward:
                last.update((root, position) for v in (*node.operands, *node.results) for root in memory.roots(v.name))
        leaving: dict[int, list[Value]] = {}
        for value in values:
            leaving.setdefault(last[roots[value.name]], []).append(value)
        moved = {v.name for v in values}
        on_host: dict[str, Value] = {}
        back: dict[str, Value] = {}
        nodes: list[Node] = []
        for position, node in enumerate(graph.nodes):
            if node.phase is not Phase.forward:
                for value in dict.fromkeys(v for v in node.operands if v.name in moved and v.name not in back):
                    back[value.name] = builder.value(f"{value.name}_back", value.type)
                    nodes.append(_reshard(builder, on_host[value.name], back[value.name], node))
                node = node.substitute(back)
            nodes.append(node)
            for value in leaving.get(position, ()):
                on_host[value.name] = builder.value(f"{value.name}_host", value.tensor.on(HOST))
                nodes.append(_reshard(builder, value, on_host[value.name], graph.producers[value.name]))
        return graph.with_nodes(nodes)

    def _with_own_views(self, roots: set[str]) -> Graph:
        """The graph whose backward takes its own views of these values."""
        seen = {
            result.name
            for node in self.graph.phase_nodes(Phase.forward)
            if views(self.graph, node)
            for result in node.results
            if self.memory.roots(result.name) & roots
        }
        return Forward(self.graph, self.context, Offload.name).computing_again(frozenset(seen)) if seen else self.graph


def _reshard(builder: Builder, value: Value, result: Value, near: Node) -> Node:
    return builder.typed("reshard", (value,), (result,), near.phase, near.origin)
