"""Type rules of codes: of what goes over the wire in the place of numbers, along the only data axis of a mesh.

N ranks reduce numbers by their codes: each codes its own addend, in N parts; they exchange parts; and each takes the
codes of its part and reduces what they stand for. A code is bytes, and a row of codes is what one rank has made:

    f32[4, 2]<P(mean)>    encode     u8[N, N * bytes]<S0>      rank r has row r: the code of its addend
                          exchange   u8[N, N * bytes]<S1>      rank r has column r: the codes of all of part r
                          decode     f32[4, 2]<S0>             rank r has part r of the mean
                          encode     u8[N * bytes]<S0>         rank r has the code of part r
                          gather     u8[N * bytes]<R>          all have the codes of all parts
                          decode     f32[4, 2]<R>
"""

from __future__ import annotations

from zgraph.errors import CodecError
from zgraph.ir.axis_rules import TypeRuleError
from zgraph.ir.codecs import Codec, parse_codec
from zgraph.ir.graph import Node
from zgraph.ir.layout import chunk_numel
from zgraph.ir.types import DType, Mesh, Partial, Replicate, Shard, TensorType, Type, data_axes, num_shards

__all__ = ["CODED", "code_bytes", "codec_of", "decoded", "encoded", "exchanged"]

CODED = (DType.f32, DType.bf16, DType.f16)
"""Dtypes whose numbers codecs code; `raw` codes f64 as well."""


def codec_of(node: Node) -> Codec:
    """The codec that a node names.

    Raises:
        TypeRuleError: it names none.
    """
    text = node.option("codec")
    if not isinstance(text, str):
        raise TypeRuleError("needs codec=, the text of a codec")
    try:
        return parse_codec(text)
    except CodecError as error:
        raise TypeRuleError(str(error).splitlines()[0]) from None


def code_bytes(codec: Codec, kind: TensorType, mesh: Mesh) -> int:
    """Bytes of the code of one rank's part of a tensor."""
    return codec.num_bytes(chunk_numel(kind.shape, num_shards(mesh)), kind.dtype)


def encoded(node: Node, mesh: Mesh) -> tuple[Type, ...]:
    """Codes of what each rank adds to a reduction, or of a rank's part of what is sharded."""
    kind, codec = _operand(node, mesh), codec_of(node)
    _check_feedback(node)
    if kind.dtype not in CODED and not (codec.is_exact and kind.dtype is DType.f64):
        raise TypeRuleError(f"codes floating-point numbers of at most 32 bits, not {kind}")
    size = num_shards(mesh) * code_bytes(codec, kind, mesh)
    if kind.placement == (Shard(0),):
        return (TensorType(DType.u8, (size,), placement=(Shard(0),)),)
    if kind.placement not in ((Partial("sum"),), (Partial("mean"),)):
        raise TypeRuleError(f"codes what is placed P(sum), P(mean) or S0, not {kind}")
    return (TensorType(DType.u8, (num_shards(mesh), size), placement=(Shard(0),)),)


def exchanged(node: Node, mesh: Mesh) -> tuple[Type, ...]:
    """Codes by rows, cut by columns."""
    kind = _operand(node, mesh)
    if node.kwargs:
        raise TypeRuleError("takes dim= and blocks= along a model axis only, which axis= names")
    if kind.dtype is not DType.u8 or kind.placement != (Shard(0),) or len(kind.shape) != 2:
        raise TypeRuleError(f"takes codes u8[ranks, bytes]<S0> along a data axis, not {kind}")
    if kind.shape[0] != num_shards(mesh) or not Shard(1).divides(kind.shape[1], num_shards(mesh)):
        raise TypeRuleError(f"takes a row of codes and a column for each of {num_shards(mesh)} ranks, not {kind}")
    return (kind.at(Shard(1)).promised(),)


def decoded(node: Node, mesh: Mesh) -> tuple[Type, ...]:
    """Type of what codes stand for: reduced over the ranks that made them, or each part as it is."""
    kind, codec = _operand(node, mesh), codec_of(node)
    made = node.results[0].type if len(node.results) == 1 else None
    if not isinstance(made, TensorType) or (made.dtype not in CODED and made.dtype is not DType.f64):
        raise TypeRuleError("makes one tensor of floating-point numbers")
    reduce = node.option("reduce")
    if reduce not in ("sum", "mean", None):
        raise TypeRuleError(f"reduces to sum or mean, not {reduce!r}")
    parts, size = num_shards(mesh), num_shards(mesh) * code_bytes(codec, made, mesh)
    shape, before, after = ((parts, size), Shard(1), Shard(0)) if reduce else ((size,), Replicate(), Replicate())
    if (kind.dtype, kind.shape, kind.placement) != (DType.u8, shape, (before,)):
        wanted = TensorType(DType.u8, shape, placement=(before,))
        raise TypeRuleError(f"makes {made.at(after)} of {wanted}, not of {kind}")
    return (made.contiguous().at(after),)


def _operand(node: Node, mesh: Mesh) -> TensorType:
    if len(node.operands) != 1 or not isinstance(kind := node.operands[0].type, TensorType):
        raise TypeRuleError("takes one tensor")
    if len(mesh) != 1 or len(data_axes(mesh)) != 1:
        raise TypeRuleError(f"needs a mesh of one data axis, not of {len(mesh)} axes")
    if kind.future or kind.is_on_host:
        raise TypeRuleError(f"takes what is on the device, not {kind}")
    return kind


def _check_feedback(node: Node) -> None:
    names = node.option("feedback")
    if names is None:
        return
    if not isinstance(names, tuple) or not names or not all(isinstance(n, str) for n in names):
        raise TypeRuleError("needs feedback= to be the names of parameters")
    if len(set(map(str, names))) < len(names):
        raise TypeRuleError("names a parameter twice in feedback=")
