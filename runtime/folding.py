"""Views folded within a region, where nobody looks: what a region returns keeps a tensor of its own, and what is read
within may be another view of the same elements.

    t = aten.t(w); u = aten.t(t); mm(x, u)                       ->      mm(x, w)
    a = aten.view(x, [8, 4]); b = aten.view(a, [2, 4, 4])        ->      b = aten.view(x, [2, 4, 4])
    a = aten.view(x, [8, 4]); b = aten.view(x, [8, 4])           ->      a = aten.view(x, [8, 4])

Each rule holds for any strides, so that it does not matter whether those that a type states are the real ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from zgraph.ir import ExternalOp, Node, Value
from zgraph.ir.external_ops import VIEW, facts
from zgraph.runtime.region import Region


def folded(region: Region, foreign: Mapping[str, ExternalOp]) -> Region:
    """A region that computes the same numbers in the same order, with fewer views.

    Args:
        region: ops without effects but their results.
        foreign: rows of the ops that are not zgraph's own.
    """
    renamed: dict[str, Value] = {}
    kept: dict[str, Node] = {}
    views: dict[object, Value] = {}
    returned = {v.name for v in region.outputs}
    for node in region.nodes:
        node = node.substitute(renamed)
        is_view = node.op in foreign and bool(foreign[node.op].views) and len(node.results) == 1
        if node.op == VIEW:
            node = _of_the_source(node, kept)
        key = (node.op, node.args, node.kwargs) if is_view else None
        same = _same(node, kept) or views.get(key)
        if same is not None and node.name not in returned:
            renamed[node.name] = same
            continue
        if key is not None:
            views.setdefault(key, node.results[0])
        kept[node.name] = node
    read, nodes = returned, list[Node]()
    for node in reversed(kept.values()):
        if any(r.name in read for r in node.results):
            read |= {v.name for v in node.operands}
            nodes.append(node)
    return replace(region, nodes=tuple(reversed(nodes)))


def _same(node: Node, kept: Mapping[str, Node]) -> Value | None:
    """A value that is there already and has the elements of a node's result: its operand, or what that is a view of."""
    if not node.operands or len(node.results) != 1:
        return None
    row, source, given = facts(node.op), node.operands[0], node.args[1:]
    if source.type == node.results[0].type and (
        row.is_first_if_alike or (row.unit is not None and given == (row.unit,) and not node.kwargs)
    ):
        return source
    maker = kept.get(source.name) if row.undoes_itself else None
    return maker.operands[0] if maker is not None and (maker.op, maker.args[1:]) == (node.op, given) else None


def _of_the_source(node: Node, kept: Mapping[str, Node]) -> Node:
    """A view of what the view that it reads is a view of: all of these have all elements, in their order."""
    while (maker := kept.get(node.operands[0].name)) is not None:
        row = facts(maker.op)
        if len(maker.operands) != 1 or row.elements != "reshaped" or not row.keeps_rows:
            break
        node = replace(node, args=(maker.operands[0], *node.args[1:]))
    return node
