"""What the lowering passes share: a reshard becomes pack, start, wait, unpack."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from zgraph.ir import Builder, Graph, Node, Placement


def placement_change(node: Node) -> tuple[Placement, Placement] | None:
    """From and to which placement a reshard goes; None for any other op."""
    if node.op != "reshard":
        return None
    return node.operands[0].tensor.placement[0], node.results[0].tensor.placement[0]


def lower(graph: Graph, wanted: Callable[[Node], bool], collective: str, made_by: str) -> Graph:
    """Every reshard that is `wanted` as a `collective` and what it needs around it."""
    builder = Builder(graph, made_by)
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.op == "reshard" and wanted(node):
            nodes.extend(_lowered(node, collective, builder))
        else:
            nodes.append(node)
    return graph.with_nodes(nodes)


def _lowered(node: Node, collective: str, builder: Builder) -> Iterator[Node]:
    stem, phase, origin = node.name, node.phase, node.origin
    options = {key: value for key, value in node.kwargs if key == "keep"}
    operand = node.operands[0]
    if len(node.operands) > 1:
        packed = builder.node("pack", node.args, f"{stem}_pack", phase, origin)
        yield packed
        operand = packed.results[0]
    start = builder.node(collective, (operand,), f"{stem}_start", phase, origin, **options)
    yield start
    if len(node.operands) > 1:
        waited = builder.node("wait", start.results, f"{stem}_flat", phase, origin)
        yield waited
        yield builder.typed("unpack", waited.results, node.results, phase, origin)
    else:
        yield builder.typed("wait", start.results, node.results, phase, origin)
