"""The backward of a micro-step under no_sync: whole gradients of stages 0 and 1 stay on the rank, unreduced.

    bwd %g_pending = pending(%g, reduce="mean")               bwd %g_pending = pending(%g, reduce="mean")
    upd %g_sum = accumulate(%g_pending, target="w")           return bwd grad "w" %g_pending
    upd %g_mean_start = reduce_scatter_start(%g_sum)    ->
    upd %g_mean = wait(%g_mean_start)
    return upd grad "w" %g_mean

Gradients of stages 2 and 3 are reduced in every micro-step all the same: not to hold them whole is what these stages
are for.
"""

from __future__ import annotations

from dataclasses import replace

from zgraph.ir import OPS, Graph, Node, OutputKind, Phase
from zgraph.ir.ops import is_pure
from zgraph.passes.dce import sweep


def without_sync(graph: Graph) -> Graph:
    """The graph whose accumulated gradients are returned raw."""
    raw = {n.option("target"): n.operands[0] for n in graph.nodes if n.op == "accumulate"}
    held = {i.value.name: raw[i.target] for i in graph.params if i.target in raw}
    outputs = tuple(
        replace(o, value=held[o.target], phase=Phase.backward)
        if o.kind is OutputKind.grad and o.value is not None and o.target in held
        else o
        for o in graph.outputs
    )

    def removable(node: Node) -> bool:
        return is_pure(graph, node) or (node.op in OPS and not OPS[node.op].consumes)

    raw_graph = replace(graph, outputs=outputs)
    used = raw_graph.with_nodes([node for node in graph.nodes if node.op != "release"])
    swept = sweep(used, removable)
    made = {result.name for node in swept.nodes for result in node.results}
    left = set(map(id, swept.nodes))
    nodes = [n for n in graph.nodes if id(n) in left or (n.op == "release" and n.operands[0].name in made)]
    return swept.with_nodes(nodes)
