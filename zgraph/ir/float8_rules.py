"""Type rules of shards in float8: the largest magnitudes of all parts of a value give the scale of the whole.

f32[4, 2]<S0>    amax            f32[N]<S0>           rank r has the largest magnitude of its part
                 gather          f32[N]<R>            all have those of all parts
                 float8_scale    f32[]<R>             the scale of the whole
f32[4, 2]<S0>    float8_cast     f8e4m3[4, 2]<S0>     each rank's part, times the scale and rounded
"""

from __future__ import annotations

from zgraph.ir.axis_rules import TypeRuleError
from zgraph.ir.graph import Node
from zgraph.ir.layout import chunk_numel
from zgraph.ir.types import DType, Mesh, Replicate, Shard, TensorType, Type, model_axes, num_shards

__all__ = ["FLOAT8", "PIECE", "amax", "cast", "cast_bytes", "scale"]

FLOAT8 = (DType.f8e4m3, DType.f8e5m2)

PIECE = 1 << 20
"""Numbers that are cast at a time, so that their fp32 copies take little memory."""

_NUMBERS = (DType.f32, DType.bf16, DType.f16, DType.f64)


def amax(node: Node, mesh: Mesh) -> tuple[Type, ...]:
    """One number a rank of the shard axis, in fp32, or in fp64 what is in fp64."""
    kind = _shard(node, mesh, 1)
    dtype = DType.f64 if kind.dtype is DType.f64 else DType.f32
    return (TensorType(dtype, (num_shards(mesh),), placement=kind.placement),)


def scale(node: Node, mesh: Mesh) -> tuple[Type, ...]:
    """One number, the same on all ranks."""
    _dtype(node)
    kind = node.operands[0].type if len(node.operands) == 1 else None
    whole = tuple(Replicate() for _ in mesh)
    if kind != TensorType(DType.f32, (num_shards(mesh),), placement=whole):
        raise TypeRuleError(f"takes the largest magnitudes of all {num_shards(mesh)} parts, not {kind}")
    return (TensorType(DType.f32, (), placement=whole),)


def cast(node: Node, mesh: Mesh) -> tuple[Type, ...]:
    """The shard in float8."""
    dtype, kind = _dtype(node), _shard(node, mesh, 2)
    wanted = TensorType(DType.f32, (), placement=tuple(Replicate() for _ in mesh))
    if node.operands[1].type != wanted:
        raise TypeRuleError(f"takes a scale {wanted}, not {node.operands[1].type}")
    return (kind.contiguous(dtype),)


def cast_bytes(node: Node, mesh: Mesh) -> int:
    """Bytes that a cast takes while it runs: fp32 copies of a piece, before and after they saturate."""
    return 9 * min(chunk_numel(node.results[0].tensor.shape, num_shards(mesh)), PIECE)


def _shard(node: Node, mesh: Mesh, count: int) -> TensorType:
    if len(node.operands) != count:
        raise TypeRuleError(f"takes {count} operands, not {len(node.operands)}")
    kind = node.operands[0].type
    is_shard = isinstance(kind, TensorType) and kind.placement[-1:] == (Shard(0),) and not kind.future
    if not is_shard or model_axes(mesh) or kind.is_on_host or kind.dtype not in _NUMBERS:  # type: ignore[union-attr]
        raise TypeRuleError(f"takes a shard of floating-point numbers on the device, not {kind}")
    assert isinstance(kind, TensorType)
    return kind


def _dtype(node: Node) -> DType:
    dtype = node.option("dtype")
    if dtype not in FLOAT8:
        raise TypeRuleError("needs dtype=, f8e4m3 or f8e5m2")
    assert isinstance(dtype, DType)
    return dtype
