"""Ops that know which part of a dim their rank has: lookups by index, losses of classes, layers of experts.

    %e = aten.embedding.default(%w, %ids)                        looks rows of `%w` up
    %e = part_embedding(%w, %ids, axis="tensor")                 looks up those that the rank has: a sum over the ranks

    %h = aten._grouped_mm.default(%x, %w, %ends)                 rows times the matrix of their group
    %h = part_grouped_mm(%x, %w, %ends, axis="expert")           those of the groups whose matrices the rank has

An op of torch takes indices for those of all rows, so that a cut along them needs another op. A placed graph has it
under a name of zgraph's own, with the arguments of torch's and the axis along which it knows its rank.

Source: vocabulary-parallel embedding and loss, Shoeybi et al., Megatron-LM, 2019.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from zgraph.ir.external_ops import INT8_EMBEDDING
from zgraph.ir.graph import Arg, Node
from zgraph.ir.rules.factors import Call, Rule, Strategy
from zgraph.ir.rules.local import localised
from zgraph.ir.rules.ring import RING, ring_way
from zgraph.ir.types import Grouped, Placement

__all__ = ["PARTS", "ROUTED", "is_ranked", "meant", "on_parts"]

PARTS: Mapping[str, str] = {
    "aten.embedding.default": "part_embedding",
    INT8_EMBEDDING: "part_int8_embedding",
    "aten.embedding_dense_backward.default": "part_embedding_backward",
    "aten.nll_loss_forward.default": "part_nll_loss",
    "aten.nll_loss_backward.default": "part_nll_loss_backward",
    "aten._grouped_mm.default": "part_grouped_mm",
    "transformers.grouped_mm_fallback.default": "part_grouped_mm_fallback",
    "transformers.grouped_mm_fallback_backward.default": "part_grouped_mm_fallback_backward",
    **RING,
}
"""The op on parts for each op of torch."""

ROUTED: Mapping[str, str] = {
    "aten.index.Tensor": "index_rows_start",
    "aten.index_put.default": "put_rows_start",
}
"""The start that brings rows to the ranks that have their groups, or from these, for ops of torch that do so whole."""

_MEANT = {part: op for op, part in PARTS.items()}


def meant(node: Node) -> Node:
    """The op of torch on parts that an op which knows its rank stands for, or the node itself."""
    match node.op, node.args:
        case "index_rows_start", (rows, at, _):
            return replace(node, op="aten.index.Tensor", args=(rows, (at,)), kwargs=())
        case "put_rows_start", (base, at, rows, _):
            return replace(node, op="aten.index_put.default", args=(base, (at,), rows, True), kwargs=())
    if node.op not in _MEANT:
        return node
    return replace(node, op=_MEANT[node.op], kwargs=tuple((k, a) for k, a in node.kwargs if k != "axis"))


def is_ranked(rule: Rule | None, places: Sequence[Placement | None]) -> bool:
    """Whether operands and results that are placed so need an op that knows its rank."""
    if rule is None:
        return False
    if rule.groups and any(isinstance(place, Grouped) for place in places):
        return True
    tensors = zip((*rule.ins, *rule.outs), places, strict=True)
    return any(
        place == rule.place(dims, (factor, (1,))) and place is not None
        for dims, place in tensors
        for factor in rule.ranked
    )


def on_parts(
    node: Node, rule: Rule | None, strategy: Strategy, axis: str, num_ranks: int
) -> tuple[str, tuple[Arg, ...], tuple[tuple[str, Arg], ...]]:
    """The op, the arguments and the options of a node on whole tensors, for ranks that have parts of them.

    Args:
        node: with the types of whole tensors.
        rule: its rule.
        strategy: how its operands and results are placed along the axis.
        axis: the axis.
        num_ranks: ranks along it.
    """
    places = (*strategy.ins, *strategy.outs)
    args = localised(node, rule, places, num_ranks)
    goes_round = node.op in RING and strategy == ring_way(Call.of(node), num_ranks)
    if not goes_round and not is_ranked(rule, places):
        return node.op, args, node.kwargs
    return PARTS[node.op], args, (*node.kwargs, ("axis", axis))
