"""Sizes in arguments: those of the whole tensors that a model means, and those of a rank's parts of them.

    %h = aten.view.default(%x, [2, 16, 4, 8])        of f32[2, 16, 32]
    %h = aten.view.default(%x, [2, 16, 2, 8])        of f32[2, 16, 16]<S2>, one of two ranks

A graph that is placed along a model axis has local sizes; `whole_call` reads such a node as the call that is meant.
"""

from __future__ import annotations

from dataclasses import replace

from zgraph.ir.graph import Arg, Node, Value
from zgraph.ir.parts import whole_along
from zgraph.ir.rules.factors import Call, Rule
from zgraph.ir.rules.pieces import FAR
from zgraph.ir.rules.table import rule_of
from zgraph.ir.types import Own, Placement, Shard, TensorType

__all__ = ["localised", "whole_node"]


def localised(node: Node, rule: Rule | None, places: tuple[Placement | None, ...], num_ranks: int) -> tuple[Arg, ...]:
    """The arguments of a node with whole sizes, for ranks that have parts.

    Args:
        node: with the types of whole tensors.
        rule: its rule.
        places: how its operands and then its results are placed along the axis.
        num_ranks: ranks along the axis.
    """
    return _resized(node, rule, places, 1, num_ranks)


def whole_node(node: Node, index: int, num_ranks: int) -> Node:
    """A node as it is meant for whole tensors along a model axis.

    Args:
        node: of a graph that is placed.
        index: the number of the axis in the mesh.
        num_ranks: ranks along it.
    """

    def whole(value: Value) -> Value:
        kind = value.type
        return replace(value, type=whole_along(kind, index, num_ranks)) if isinstance(kind, TensorType) else value

    places = tuple(
        v.type.placement[index] if isinstance(v.type, TensorType) else None for v in (*node.operands, *node.results)
    )
    if not any(isinstance(place, Shard | Own) for place in places):
        return node
    made = replace(node.substitute({v.name: whole(v) for v in node.operands}), results=tuple(map(whole, node.results)))
    return replace(made, args=_resized(made, rule_of(Call.of(made)), places, num_ranks, 1))


def _resized(
    node: Node, rule: Rule | None, places: tuple[Placement | None, ...], times: int, over: int
) -> tuple[Arg, ...]:
    args = list(node.args)
    cut = {
        (side, place.dim)
        for number, place in enumerate(places)
        if isinstance(place, Shard | Own)
        for side in ("in" if number < len(node.operands) else "out",)
    }
    for position, what in rule.local if rule is not None else ():
        if position >= len(args):
            continue
        kind, _, dim = what.partition(" ")
        arg = args[position]
        if kind == "shape":
            dims = {d for side, d in cut if side == "out"}
            if isinstance(arg, tuple):
                args[position] = tuple(
                    size * times // over if d in dims and isinstance(size, int) and size > 0 else size
                    for d, size in enumerate(arg)
                )
        elif {("in", int(dim)), ("out", int(dim))} & cut and (kind != "made" or ("out", int(dim)) in cut):
            args[position] = _scaled(arg, times, over)
    return tuple(args)


def _scaled(arg: Arg, times: int, over: int) -> Arg:
    if isinstance(arg, tuple):
        return tuple(_scaled(item, times, over) for item in arg)
    return arg * times // over if isinstance(arg, int) and not isinstance(arg, bool) and arg < FAR else arg
