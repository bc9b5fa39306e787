"""Type rules of starts that look rows up, or add them, between ranks that have them by position and by group.

    %s_start: future f32[48, 32]<G0, V> = index_rows_start(%x, %at, %ends, axis="expert")
    %y_start: future f32[12, 32]<S0, V> = put_rows_start(%zeros, %at, %s, %ends, axis="expert")

The first is `%x[%at]` of rows that ranks have parts of, in the order of their groups: each rank is sent those of the
groups that it has. The second adds row r of `%s` to row `%at[r]`, wherever that is. `%ends` counts rows up to the end
of each group; `%at` and `%ends` are whole, so that every rank knows what each sends. Either goes both ways.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from zgraph.ir.axis_rules import TypeRuleError, axis_of
from zgraph.ir.graph import Node
from zgraph.ir.layout import concrete
from zgraph.ir.rules.own import routed_in_order
from zgraph.ir.symbols import simplify
from zgraph.ir.type_rules import tensor
from zgraph.ir.types import (
    DType,
    Grouped,
    Mesh,
    Own,
    Partial,
    Placement,
    Replicate,
    Shard,
    TensorType,
    Type,
    Varying,
    model_axes,
)

__all__ = ["ROUTED_DOCS", "routed", "routed_bytes"]

BY_POSITION, BY_GROUP = Shard(0), Grouped(0)

ROUTED_DOCS: Mapping[str, str] = {
    "index_rows_start": "Begin to look rows up by index, for the ranks that have their groups, or from these.",
    "put_rows_start": "Begin to add rows to others by index, on the ranks that have these by position, or by group.",
}
"""A line of what each op does."""

_INTEGERS = frozenset({DType.i64, DType.i32})


def routed(node: Node, mesh: Mesh) -> tuple[Type, ...]:
    """The type of what arrives: of the rows of the groups that the rank has, or of the rows of its part."""
    index, size = axis_of(node, mesh)
    is_put = node.op == "put_rows_start"
    if len(node.operands) != 3 + is_put:
        raise TypeRuleError(f"takes {3 + is_put} tensors")
    kinds = [tensor(node, i) for i in range(len(node.operands))]
    if any(kind.future or kind.is_on_host or len(kind.placement) != len(mesh) for kind in kinds):
        raise TypeRuleError("reads tensors that are on the device, one placement a mesh axis")
    moved, base, at, ends = kinds[_moved_at(node)], kinds[0], kinds[1], kinds[-1]
    for kind in (at, ends):
        if kind.dtype not in _INTEGERS or len(kind.shape) != 1 or kind.placement[index] != Replicate():
            raise TypeRuleError(f"finds rows by indices that all ranks of the axis have, and not by {kind}")
    own = _beside(node, kinds, index, mesh)
    old = moved.placement[index]
    if old not in (BY_POSITION, BY_GROUP) or not moved.shape:
        raise TypeRuleError(f"moves rows that are placed {BY_POSITION} or {BY_GROUP}, not {moved}")
    new: Placement = BY_GROUP if old == BY_POSITION else BY_POSITION
    count = simplify(at.shape[0])
    if not isinstance(count, int) or (new == BY_POSITION and not is_put and count % size):
        raise TypeRuleError(f"makes parts of one size, and {count} rows do not divide by {size}")
    if not is_put:
        rows = count // size if new == BY_POSITION else count
        made = TensorType(moved.dtype, (rows, *moved.shape[1:]))
    else:
        given = moved.shape[0] * (size if old == BY_POSITION else 1)
        if base.placement[index] != new or base.dtype is not moved.dtype or base.shape[1:] != moved.shape[1:]:
            raise TypeRuleError(f"adds rows of {moved} to what is like them and placed {new}, not to {base}")
        if given != count:
            raise TypeRuleError(f"has {count} indices of {given} rows")
        made = TensorType(moved.dtype, base.shape)
    return (made.at(*own[:index], new, *own[index + 1 :]).promised(),)


def _moved_at(node: Node) -> int:
    """The operand whose rows move."""
    return 2 if node.op == "put_rows_start" else 0


def _beside(node: Node, kinds: list[TensorType], index: int, mesh: Mesh) -> list[Placement]:
    """The placement of a result along the other axes: whole along model axes, or in a rank's own order, or put back
    from that; a rank's own along those of data.
    """
    num_model = len(model_axes(mesh))
    found: list[Placement] = []
    for number in range(len(mesh)):
        listed = [kind.placement[number] for kind in kinds]
        places = set(listed) if number != index else set()
        allowed = {Replicate()} if number < num_model else {Replicate(), Varying()}
        if number < num_model and any(isinstance(place, Own) for place in places):
            ways = routed_in_order(is_put=node.op == "put_rows_start", places=listed[:-1])
            if not ways or listed[-1] not in (Replicate(), Partial("sum")):
                raise TypeRuleError("moves rows in a rank's own order to others in it, or from these, by own counts")
            found.append(ways[0])
            continue
        if places - allowed:
            raise TypeRuleError("moves values that are whole along other model axes, and no sums")
        found.append(Varying() if Varying() in places else Replicate())
    return found


def routed_bytes(node: Node) -> int:
    """Bytes of all rows that a start moves between all ranks, those that stay where they are among them."""
    kind = tensor(node, _moved_at(node))
    row = math.prod(map(concrete, kind.shape[1:])) * kind.dtype.itemsize
    return concrete(tensor(node, 1).shape[0]) * row
