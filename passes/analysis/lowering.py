"""Code shared by the lowering passes: a reshard becomes pack, start, wait, unpack; or one grouped start, and waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from zgraph.ir import Builder, Graph, Node, Partial, Placement, Reduction


def placement_change(node: Node) -> tuple[Placement, Placement] | None:
    """From and to which placement along the shard axis a reshard goes; None where that does not change."""
    if node.op != "reshard":
        return None
    old, new = node.operands[0].tensor, node.results[0].tensor
    if old.placement == new.placement or old.placement[-1] == new.placement[-1]:
        return None  # it is another memory that changes, or the placement along a model axis
    return old.placement[-1], new.placement[-1]


def reduces(node: Node, to: Placement, *reductions: Reduction) -> bool:
    """Whether a reshard is one of these reductions, to this placement along the shard axis."""
    change = placement_change(node)
    return change is not None and change[1] == to and change[0] in [Partial(r) for r in reductions]


def lower(
    graph: Graph, wanted: Callable[[Node], bool], collective: str, made_by: str, *, grouped: bool = False
) -> Graph:
    """Every reshard that is `wanted` as a `collective` and what it needs around it.

    Args:
        graph: the graph.
        wanted: which reshards.
        collective: the op that starts it.
        made_by: the pass.
        grouped: a bucket is one call that moves its members from and to where they are, without a copy.
    """
    if not any(node.op == "reshard" and wanted(node) for node in graph.nodes):
        return graph
    builder = Builder(graph, made_by)
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.op == "reshard" and wanted(node):
            nodes.extend((_grouped if grouped else _lowered)(node, collective, builder))
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


def _grouped(node: Node, collective: str, builder: Builder) -> Iterator[Node]:
    options = {key: value for key, value in node.kwargs if key == "keep"}
    start = builder.node(collective, node.operands, f"{node.name}_start", node.phase, node.origin, **options)
    yield start
    for future, result in zip(start.results, node.results, strict=True):
        yield builder.typed("wait", (future,), (result,), node.phase, node.origin)
