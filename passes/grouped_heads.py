"""Attend with groups of heads where their keys and values lie, without a copy of these for each head.

    fwd %k_1: f32[2, 2, 1, 16, 8] = aten.unsqueeze.default(%k, 2)
    fwd %k_2: f32[2, 2, 4, 16, 8 | ...] = aten.expand.default(%k_1, [2, 2, 4, 16, 8])
    fwd %k_3: f32[2, 2, 4, 16, 8] = aten.clone.default(%k_2, ...)
    fwd %k_4: f32[2, 8, 16, 8] = aten._unsafe_view.default(%k_3, [2, 8, 16, 8])
    fwd %y: f32[2, 8, 1, 8], %_ = aten._scaled_dot_product_flash_attention_for_cpu.default(%q, %k_4, %v_4, ...)
                    |
                    v
    fwd %q_g: f32[2, 2, 4, 8] = aten.view.default(%q, [2, 2, 4, 8])
    fwd %y_g: f32[2, 2, 4, 8 | ...], %_ = aten._scaled_dot_product_flash_attention_for_cpu.default(%q_g, %k, %v, ...)

The heads of a group become the rows of one head. That takes one token a row of the batch, whose heads all see the same
places: a step that decodes. A copy for each head would read and write a whole cache in every layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from zgraph.ir import Arg, ExternalOp, Graph, Node, TensorType, Token, Value
from zgraph.ir.builder import Builder
from zgraph.ir.layout import is_contiguous
from zgraph.passes.core.base import Context, Numerics, Pass
from zgraph.passes.dce import DeadCode

ATTENTION = "aten._scaled_dot_product_flash_attention_for_cpu.default"

_VIEW, _CLONE, _EXPAND = "aten.view.default", "aten.clone.default", "aten.expand.default"
_UNSQUEEZE, _UNSAFE_VIEW = "aten.unsqueeze.default", "aten._unsafe_view.default"
_ROWS = {_VIEW: ExternalOp(views=(0,)), _CLONE: ExternalOp()}


@dataclass(frozen=True)
class GroupedHeads(Pass):
    """Attend with groups of heads where their keys and values lie, without a copy of these for each head."""

    name: ClassVar[str] = "grouped-heads"
    numerics: ClassVar[Numerics] = Numerics.reassociates

    def run(self, graph: Graph, context: Context) -> Graph:
        builder, nodes = Builder(graph, self.name), list[Node]()
        for node in graph.nodes:
            nodes.extend(_grouped(graph, node, builder) or [node])
        if len(nodes) == len(graph.nodes):
            return graph
        whole = replace(graph, nodes=tuple(nodes), foreign={**_ROWS, **graph.foreign})
        return DeadCode().run(whole, context)


def _grouped(graph: Graph, node: Node, builder: Builder) -> list[Node]:
    """An attention by groups in the place of one by heads; empty where it is none, or another."""
    if node.op != ATTENTION or len(node.args) != 3 or {key for key, _ in node.kwargs} - {"attn_mask", "scale"}:
        return []
    query, keys, values = node.operands[0], *(_shared(graph, v) for v in node.operands[1:3])
    y, sums = node.results
    if keys is None or values is None or graph.users.get(sums.name) or sums.name in graph.output_names:
        return []
    batch, heads, tokens, dim = query.tensor.shape
    groups = keys.tensor.shape[1]
    mask = node.option("attn_mask")
    is_one_token = tokens == 1 and query.tensor.strides is None and y.tensor.strides is None
    is_shared = mask is None or (isinstance(mask, Value) and mask.tensor.shape[1:3] == (1, 1))
    if not is_one_token or not is_shared or not all(isinstance(d, int) for d in (batch, heads, groups, dim)):
        return []
    num_groups, each, width = int(groups), int(heads) // int(groups), int(values.tensor.shape[3])
    rows = replace(query.tensor, shape=(batch, num_groups, each, dim))
    wide = (batch, num_groups, each, width)
    few = (batch, num_groups, each), (num_groups * each, 1, num_groups)
    grouped = builder.value(f"{query.name}_grouped", rows)
    made = builder.value(f"{y.name}_grouped", replace(y.tensor, shape=wide))
    others = builder.value(
        f"{sums.name}_grouped", TensorType(sums.tensor.dtype, few[0], None if is_contiguous(*few) else few[1])
    )
    dense = builder.value(f"{y.name}_dense", replace(y.tensor, shape=wide))

    def typed(op: str, args: tuple[Arg, ...], *results: Value, **options: Arg) -> Node:
        return builder.typed(op, args, results, node.phase, node.origin, **options)

    return [
        typed(_VIEW, (query, rows.shape), grouped),
        typed(ATTENTION, (grouped, keys, values), made, others, **dict(node.kwargs)),
        typed(_CLONE, (made,), dense, memory_format=Token("memory_format", "contiguous_format")),
        typed(_VIEW, (dense, y.tensor.shape), y),
    ]


def _shared(graph: Graph, value: Value) -> Value | None:
    """The keys or values [batch, groups, places, dim] that these repeat for each head; None if they do not."""
    ops = ((_UNSAFE_VIEW, _VIEW), (_CLONE,), (_EXPAND,), (_UNSQUEEZE,))
    shape, found, node = value.tensor.shape, value, None
    for names in ops:
        node = graph.producers.get(found.name)
        if node is None or node.op not in names:
            return None
        found = node.operands[0]
    assert node is not None
    if node.args[1] != 2 or len(found.tensor.shape) != 4:
        return None
    batch, groups, places, dim = found.tensor.shape
    heads = shape[1]
    is_whole = isinstance(heads, int) and isinstance(groups, int) and groups < heads and heads % groups == 0
    return found if is_whole and shape == (batch, heads, places, dim) else None
