"""Type rules of zgraph's own ops: from a node and the mesh to the types that its results must have.

A rule raises TypeRuleError where the operands do not fit the op; the message says what it takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from zgraph.ir.axis_rules import TypeRuleError, changed_axis, laid_as_stated, moved, moved_along
from zgraph.ir.coded_rules import check_coded
from zgraph.ir.graph import Node
from zgraph.ir.layout import bucket_layout
from zgraph.ir.types import (
    DEVICE,
    REDUCTIONS,
    DType,
    Mesh,
    Partial,
    Placement,
    Reduction,
    Replicate,
    Shard,
    TensorType,
    Type,
    Varying,
    model_axes,
    num_shards,
)

__all__ = ["TypeRule", "TypeRuleError", "tensor"]

TypeRule = Callable[[Node, Mesh], tuple[Type, ...]]


def tensor(node: Node, index: int = 0) -> TensorType:
    """The tensor type of the node's operand number `index`."""
    found = node.operands[index].type
    if not isinstance(found, TensorType):
        raise TypeRuleError(f"operand {index} is {found}, not a tensor")
    return found


def _one(node: Node) -> TensorType:
    if len(node.operands) != 1:
        raise TypeRuleError(f"takes one operand, not {len(node.operands)}")
    return tensor(node)


def _moved(node: Node, change: Callable[[TensorType], TensorType]) -> tuple[Type, ...]:
    """Result types of a collective: a future for each operand, with the placement that `change` gives it."""
    if not node.operands:
        raise TypeRuleError("takes one operand or more")
    kinds = [tensor(node, i) for i in range(len(node.operands))]
    if len({(k.dtype, k.placement) for k in kinds}) > 1:
        raise TypeRuleError("moves tensors of one dtype and one placement")
    return tuple(change(k).contiguous().promised() for k in kinds)


def _sharded(kind: TensorType) -> TensorType:
    """The operand of a gather."""
    if kind.future or not kind.placement or kind.placement[-1] != Shard(0):
        raise TypeRuleError(f"its operand must be sharded on dim 0 along the last axis, not {kind}")
    return kind


def _pending(kind: TensorType, mesh: Mesh, *reductions: Reduction) -> TensorType:
    """The operand of a reduction: it is pending along the last axis, and along other data axes in the same way or
    replicated."""
    num_model = len(model_axes(mesh))
    is_whole = all(isinstance(p, Partial | Replicate) for p in kind.placement[num_model:])
    is_whole = is_whole and not any(isinstance(p, Partial) for p in kind.placement[:num_model])
    last = kind.placement[-1] if kind.placement else None
    if kind.future or not is_whole or not isinstance(last, Partial) or kind.reduction not in reductions:
        names = " or ".join(str(Partial(r)) for r in reductions)
        remedy = "; say with pending what the ranks' own values are together" if kind.varies else ""
        raise TypeRuleError(f"its operand must be placed {names} along each axis that it reduces, not {kind}{remedy}")
    return kind


def gathered(node: Node, mesh: Mesh) -> tuple[Type, ...]:
    """Onto the device, from wherever the shards lie."""
    if node.option("axis") is not None:
        return moved_along(node, mesh)
    check_coded(node)
    return _moved(node, lambda kind: _whole(_sharded(kind)).on(DEVICE))


def _whole(kind: TensorType) -> TensorType:
    """A sharded tensor, gathered."""
    return kind.at(*kind.placement[:-1], Replicate())


def _part_of(kind: TensorType) -> TensorType:
    """A pending tensor, reduced and sharded."""
    return kind.at(*kind.reduced().placement[:-1], Shard(0))


def scattered(node: Node, mesh: Mesh) -> tuple[Type, ...]:
    if node.option("axis") is not None:
        return moved_along(node, mesh)
    return _moved(node, lambda kind: _part_of(_pending(kind, mesh, "sum", "mean")))


def all_reduced(node: Node, mesh: Mesh) -> tuple[Type, ...]:
    if node.option("axis") is not None:
        return moved_along(node, mesh)
    return _moved(node, lambda kind: _pending(kind, mesh, "sum", "mean").reduced())


def broadcast(node: Node, mesh: Mesh) -> tuple[Type, ...]:
    return _moved(node, lambda kind: _pending(kind, mesh, "root").reduced())


def copied_to(space: str) -> TypeRule:
    """The operand, whole as it lies, in another memory space."""

    def rule(node: Node, _: Mesh) -> tuple[Type, ...]:
        kind = _one(node)
        if kind.future or kind.space == space:
            raise TypeRuleError(f"copies to the {space} what does not lie there, not {kind}")
        return (kind.on(space).promised(),)

    return rule


def waited(node: Node, _: Mesh) -> tuple[Type, ...]:
    kind = _one(node)
    if not kind.future:
        raise TypeRuleError(f"waits for a future, not for {kind}")
    return (kind.delivered(),)


def resharded(node: Node, mesh: Mesh) -> tuple[Type, ...]:
    """Result types of a reshard: shards become whole, pending values are reduced, the memory space may change; or the
    placement changes along one model axis. All else stays."""
    if node.option("reduce") is not None:
        raise TypeRuleError("takes no reduce=: what is pending is in the type of its operand")
    results = []
    for value, result in zip(node.operands, node.results, strict=True):
        kind, made = tensor(replace(node, args=(value,), kwargs=())), result.type
        if not isinstance(made, TensorType) or (kind.placement, kind.space) == (made.placement, made.space):
            raise TypeRuleError(f"must change the placement or the memory space of %{value.name}")
        if (index := changed_axis(kind, made, mesh)) is not None and kind.space == made.space:
            if len(node.operands) > 1:
                raise TypeRuleError("moves one tensor along a model axis")
            results.append(laid_as_stated(moved(kind, index, mesh[index].size, made.placement[index]), node.results))
            continue
        same = kind
        if kind.placement != made.placement:
            if made.placement not in (ways := _ways(kind, mesh)):
                names = " or ".join(str(kind.contiguous().at(*way)) for way in ways)
                raise TypeRuleError(f"makes {names} of %{value.name}, not {made}")
            same = kind.contiguous()
        results.append(same.at(*made.placement).on(made.space))
    return tuple(results)


def _ways(kind: TensorType, mesh: Mesh) -> tuple[tuple[Placement, ...], ...]:
    """The placements that there is a collective to."""
    if kind.is_sharded:
        return (_whole(kind).placement,)
    reduced = _pending(kind, mesh, *REDUCTIONS).reduced().placement
    return (reduced,) if kind.reduction == "root" else (reduced, _part_of(kind).placement)


def packed(node: Node, mesh: Mesh) -> tuple[Type, ...]:
    kinds = [tensor(node, i) for i in range(len(node.operands))]
    if len({(k.dtype, k.placement, k.space) for k in kinds}) != 1:
        raise TypeRuleError("packs tensors of one dtype, one placement and one memory space")
    numel = bucket_layout(kinds, num_shards(mesh)).part_numel * num_shards(mesh)
    return (TensorType(kinds[0].dtype, (numel,), placement=kinds[0].placement, space=kinds[0].space),)


def unpacked(node: Node, mesh: Mesh) -> tuple[Type, ...]:
    flat = _one(node)
    members = [r.type for r in node.results if isinstance(r.type, TensorType)]
    if len(members) != len(node.results) or any(m.dtype is not flat.dtype for m in members):
        raise TypeRuleError(f"unpacks into tensors of {flat.dtype.value}")
    if bucket_layout(members, num_shards(mesh)).part_numel * num_shards(mesh) != flat.numel:
        raise TypeRuleError("its results do not fill its operand")
    return tuple(m.contiguous().at(*flat.placement).on(flat.space) for m in members)


def cast(node: Node, mesh: Mesh) -> tuple[Type, ...]:
    dtype = node.option("dtype")
    if not isinstance(dtype, DType):
        raise TypeRuleError("needs dtype=")
    kind = _one(node)
    if any(isinstance(p, Partial) for p in kind.placement[: len(model_axes(mesh))]) and dtype is not kind.dtype:
        raise TypeRuleError(f"rounds parts of a sum, which is not to round the sum: reduce {kind} first")
    return (kind.contiguous(dtype),)


def copied(node: Node, mesh: Mesh) -> tuple[Type, ...]:
    kind, num_model = _one(node).contiguous(), len(model_axes(mesh))
    made, own = node.results[0].type if node.results else kind, kind.placement[num_model:]
    if isinstance(made, TensorType) and made.varies and all(isinstance(p, Replicate) for p in own):
        return (kind.at(*kind.placement[:num_model], *(Varying() for _ in own)),)
    return (kind,)


def accumulated(node: Node, mesh: Mesh) -> tuple[Type, ...]:
    if not isinstance(node.option("target"), str):
        raise TypeRuleError("needs target=, the name of the parameter")
    return (_pending(_one(node), mesh, "sum", "mean"),)


def stated(node: Node, _: Mesh) -> tuple[Type, ...]:
    kind, reduction = _one(node), next((r for r in REDUCTIONS if r == node.option("reduce")), None)
    if reduction is None:
        raise TypeRuleError(f"needs reduce=, one of {', '.join(REDUCTIONS)}")
    if kind.future or not kind.varies:
        raise TypeRuleError(f"says what values of the ranks' own are together, and {kind} is none")
    return (kind.at(*(Partial(reduction) if isinstance(p, Varying) else p for p in kind.placement)),)


def released(node: Node, _: Mesh) -> tuple[Type, ...]:
    _one(node)
    return ()
