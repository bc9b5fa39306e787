"""Type rules of what moves a value along a model axis: from one of these placements to another.

    P(sum) -> R    all_reduce_start            S -> R    all_gather_start           R -> S         slice
    P(sum) -> S    reduce_scatter_start        S -> S    all_to_all_start           R -> P(sum)    first_rank
    P(max) -> R    all_reduce_start

The first five are collectives of the ranks of the axis, the last two are free: each rank keeps its part of what it
has, or the first one all of it and the others zeros. What comes of it is new memory, laid out as its type says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from zgraph.ir.graph import Node, Value
from zgraph.ir.parts import part_along, whole_along
from zgraph.ir.types import (
    MODEL_AXES,
    DType,
    Mesh,
    Partial,
    Placement,
    Replicate,
    Shard,
    TensorType,
    Type,
)

__all__ = ["SUMMED", "TypeRuleError", "axis_of", "changed_axis", "collective", "laid_as_stated", "moved", "moved_along"]

SUM = Partial("sum")

SUMMED = frozenset({DType.f64, DType.f32, DType.f16, DType.bf16, DType.f8e4m3, DType.f8e5m2, DType.c64, DType.c128})
"""Dtypes of which partial sums are reduced."""


class TypeRuleError(ValueError):
    """The operands of an op do not fit it."""


def axis_of(node: Node, mesh: Mesh) -> tuple[int, int]:
    """The number in the mesh of the model axis that a node moves its operand along, and the ranks along it."""
    name = node.option("axis")
    for index, axis in enumerate(mesh):
        if axis.name == name and name in MODEL_AXES:
            return index, axis.size
    known = ", ".join(a.name for a in mesh if a.name in MODEL_AXES) or "no model axis"
    raise TypeRuleError(f"axis={name!r} is no model axis of the mesh, which has {known}")


def collective(old: Placement, new: Placement) -> str:
    """The op that changes a placement along a model axis; empty if none does."""
    match old, new:
        case Partial("sum" | "max"), Replicate():
            return "all_reduce_start"
        case Partial("sum"), Shard():
            return "reduce_scatter_start"
        case Shard(), Replicate():
            return "all_gather_start"
        case Shard(), Shard() if old != new:
            return "all_to_all_start"
        case Replicate(), Shard():
            return "slice"
        case Replicate(), Partial("sum"):
            return "first_rank"
    return ""


def changed_axis(old: TensorType, new: TensorType, mesh: Mesh) -> int | None:
    """The number of the only axis along which two placements differ, if that is a model axis."""
    if len(old.placement) != len(mesh) or len(new.placement) != len(mesh):
        return None
    found = [i for i, (one, other) in enumerate(zip(old.placement, new.placement, strict=True)) if one != other]
    return found[0] if len(found) == 1 and mesh[found[0]].name in MODEL_AXES else None


def moved(kind: TensorType, index: int, num_ranks: int, place: Placement) -> TensorType:
    """The type of a value that is brought to a placement along a model axis.

    Raises:
        TypeRuleError: nothing does that, or the dim does not divide.
    """
    old = kind.placement[index]
    if not collective(old, place):
        raise TypeRuleError(f"nothing makes {place} of {kind} along a model axis")
    if kind.future or kind.is_on_host:
        raise TypeRuleError(f"moves what is on the device, not {kind}")
    if SUM in (old, place) and kind.dtype not in SUMMED:
        raise TypeRuleError(f"sums floating-point numbers, not {kind.dtype.value}")
    try:
        return part_along(whole_along(kind, index, num_ranks), index, num_ranks, place)
    except ValueError as error:
        raise TypeRuleError(str(error)) from None


def moved_along(node: Node, mesh: Mesh) -> tuple[Type, ...]:
    """The result type of a node that moves its operand along the model axis that its `axis` names."""
    index, num_ranks = axis_of(node, mesh)
    if len(node.operands) != 1 or not isinstance(kind := node.operands[0].type, TensorType):
        raise TypeRuleError("moves one tensor along a model axis")
    if len(kind.placement) != len(mesh):
        raise TypeRuleError(f"has {len(kind.placement)} placements, not {len(mesh)}")
    old, place = kind.placement[index], _wanted(node)
    if collective(old, place) != node.op:
        raise TypeRuleError(f"makes {place} of something else than {old} along {mesh[index].name}, which is {kind}")
    made = laid_as_stated(moved(kind, index, num_ranks, place), node.results)
    return (made.promised() if node.op.endswith("_start") else made,)


def laid_as_stated(made: TensorType, results: Sequence[Value]) -> TensorType:
    """The type of what is moved: it lies in memory as is stated of it, or else as the operand did."""
    stated = results[0].type if len(results) == 1 else None
    if not isinstance(stated, TensorType) or len(stated.strides or made.shape) != len(made.shape):
        return made
    return replace(made, strides=stated.strides)


def _wanted(node: Node) -> Placement:
    """The placement that a node brings its operand to."""
    if node.op in ("all_reduce_start", "all_gather_start"):
        return Replicate()
    if node.op == "first_rank":
        return SUM
    dim, blocks = node.option("dim"), node.option("blocks")
    if not isinstance(dim, int) or isinstance(dim, bool) or dim < 0:
        raise TypeRuleError("needs dim=, the tensor dim that is cut")
    if blocks is None:
        return Shard(dim)
    if not isinstance(blocks, tuple) or not all(isinstance(b, int) and b > 0 for b in blocks) or len(blocks) < 2:
        raise TypeRuleError("needs blocks= to be the sizes of two blocks or more")
    return Shard(dim, tuple(b for b in blocks if isinstance(b, int)))
