"""Type rules of codes: of what goes over the wire in the place of numbers, along the data axes of a mesh.

N ranks reduce numbers by their codes: each codes its own addend, in N parts; they exchange parts; and each takes the
codes of its part and reduces what they stand for. A code is bytes, and a row of codes is what one rank has made:

    f32[4, 2]<P(mean)>    encode     u8[N, N * bytes]<S0>      rank r has row r: the code of its addend
                          exchange   u8[N, N * bytes]<S1>      rank r has column r: the codes of all of part r
                          decode     f32[4, 2]<S0>             rank r has part r of the mean
                          encode     u8[N * bytes]<S0>         rank r has the code of part r
                          gather     u8[N * bytes]<R>          all have the codes of all parts
                          decode     f32[4, 2]<R>

On a mesh of two data axes numbers are summed along the inner one, over which parameters are sharded, and codes are sent
along the outer one, by the R ranks that hold the same shard; their parts are parts of the shard:

    f32[4, 2]<P(mean), P(mean)>   inner_reduce_scatter   f32[4, 2]<P(mean), S0>
                                  encode                 u8[N * R * bytes]<V, S0>
                                  outer_all_to_all       u8[N * R * bytes]<V, S0>
                                  decode                 f32[N * numbers]<V, S0>      rank r of R has part r
                                  encode                 u8[N * bytes]<V, S0>
                                  outer_all_gather       u8[N * R * bytes]<R, S0>
                                  decode                 f32[4, 2]<R, S0>

What is sharded and gathered is coded, gathered and decoded so, too, and the gather names the codec. Codes of variable
length have the room of the longest, and only what there is of them travels. `delta` and `difference` name the
parameters whose `copies` they change, which all ranks keep from one step to the next. A gather of `difference` names
the dtype of the numbers, by which its bytes are estimated:

    bf16[4, 2]<S0>        encode     u8[N * most]<S0>
                          gather     u8[N * most]<R>
                          decode     bf16[4, 2]<R>
"""

from __future__ import annotations

from zgraph.errors import CodecError
from zgraph.ir.axis_rules import TypeRuleError
from zgraph.ir.codecs import HEAD_BYTES, Codec, Difference, Raw, Sized, parse_codec
from zgraph.ir.graph import Node
from zgraph.ir.layout import chunk_numel
from zgraph.ir.types import (
    DType,
    Mesh,
    Partial,
    Placement,
    Replicate,
    Shard,
    TensorType,
    Type,
    Varying,
    data_axes,
    num_data_ranks,
    num_shards,
)

__all__ = [
    "CODED",
    "check_coded",
    "code_bytes",
    "codec_of",
    "coded_rows",
    "decoded",
    "encoded",
    "exchanged",
    "exchanged_outside",
    "expected_bytes",
    "gathered_outside",
    "num_copies",
    "outer_numel",
    "scattered_inside",
]

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


def num_copies(mesh: Mesh) -> int:
    """Ranks that hold the same shard: those of the outer data axis."""
    return num_data_ranks(mesh) // num_shards(mesh)


def outer_numel(kind: TensorType, mesh: Mesh) -> int:
    """Numbers of a rank's part of its shard, of as many parts as ranks hold it."""
    return -(-chunk_numel(kind.shape, num_shards(mesh)) // num_copies(mesh))


def _outer_bytes(codec: Codec, kind: TensorType, mesh: Mesh) -> int:
    """Bytes of the codes of all parts of a rank's shard."""
    return num_copies(mesh) * codec.num_bytes(outer_numel(kind, mesh), kind.dtype)


def coded_rows(kind: TensorType, mesh: Mesh, *, of_shard: bool) -> tuple[DType, int]:
    """Dtype and numbers of one row of a value's codes.

    Args:
        kind: of the numbers.
        mesh: the ranks.
        of_shard: whether a sharded value is coded in the parts of those that hold the same shard.
    """
    is_outside = of_shard and kind.is_sharded and num_copies(mesh) > 1
    return kind.dtype, outer_numel(kind, mesh) if is_outside else chunk_numel(kind.shape, num_shards(mesh))


def encoded(node: Node, mesh: Mesh) -> tuple[Type, ...]:
    """Codes of what each rank adds to a reduction, or of a rank's part of what is sharded."""
    codec = codec_of(node)
    if isinstance(codec, Sized) or node.option("copies") is not None:
        return _encoded_sized(node, mesh, codec)
    kind = _operand(node, mesh)
    _check_names(node, "feedback")
    if kind.dtype not in CODED and not (codec.is_exact and kind.dtype is DType.f64):
        raise TypeRuleError(f"codes floating-point numbers of at most 32 bits, not {kind}")
    size = num_shards(mesh) * code_bytes(codec, kind, mesh)
    if kind.is_sharded and kind.reduction in ("sum", "mean"):
        size = num_shards(mesh) * _outer_bytes(codec, kind, mesh)
        return (TensorType(DType.u8, (size,), placement=(Varying(), Shard(0))),)
    if kind.is_sharded:
        return (TensorType(DType.u8, (size,), placement=kind.placement),)
    if kind.placement not in ((Partial("sum"),), (Partial("mean"),)):
        raise TypeRuleError(f"codes what is placed P(sum), P(mean) or S0, not {kind}")
    return (TensorType(DType.u8, (num_shards(mesh), size), placement=(Shard(0),)),)


def _encoded_sized(node: Node, mesh: Mesh, codec: Codec) -> tuple[Type, ...]:
    """Codes of a rank's part of what is sharded along the last axis, whatever the other axes."""
    kind = _tensor(node)
    _check_copies(node, codec)
    if isinstance(codec, Sized) and kind.dtype not in codec.dtypes:
        raise TypeRuleError(f"{codec} codes numbers in {', '.join(d.value for d in codec.dtypes)}, not {kind}")
    if not kind.placement or kind.placement[-1] != Shard(0):
        raise TypeRuleError(f"{codec} codes what is sharded on dim 0 along the last axis, not {kind}")
    size = num_shards(mesh) * code_bytes(codec, kind, mesh)
    return (TensorType(DType.u8, (size,), placement=kind.placement),)


def _decoded_sized(node: Node, mesh: Mesh, codec: Codec, made: TensorType) -> tuple[Type, ...]:
    kind = _tensor(node)
    _check_copies(node, codec)
    whole = made.at(*kind.placement)
    wanted = TensorType(DType.u8, (num_shards(mesh) * code_bytes(codec, whole, mesh),), placement=kind.placement)
    if isinstance(codec, Sized) and made.dtype not in codec.dtypes:
        raise TypeRuleError(f"{codec} stands for numbers in {', '.join(d.value for d in codec.dtypes)}, not {made}")
    if node.option("reduce") is not None or kind != wanted or kind.placement[-1:] != (Replicate(),):
        raise TypeRuleError(f"makes {whole} of all codes {wanted}, not of {kind}")
    return (whole.contiguous(),)


def check_coded(gather: Node) -> None:
    """Raise TypeRuleError where a gather that names a codec is not of one value's codes."""
    if gather.option("codec") is None:
        return
    if isinstance(codec_of(gather), Difference) != isinstance(gather.option("dtype"), DType):
        raise TypeRuleError("takes dtype=, that of the numbers, for codes of difference, and for no others")
    if _tensor(gather).dtype is not DType.u8 or len(_tensor(gather).shape) != 1:
        raise TypeRuleError(f"gathers codes u8[bytes]<S0>, where it names their codec, not {_tensor(gather)}")


def expected_bytes(gather: Node, mesh: Mesh) -> int:
    """Bytes that the codes of all ranks are expected to take, where their length is their own; else 0."""
    if gather.option("codec") is None or not isinstance(codec := codec_of(gather), Sized):
        return 0
    count, dtype = num_shards(mesh), gather.option("dtype")
    most = chunk_numel(_tensor(gather).shape, count) - HEAD_BYTES
    return count * codec.expected_bytes(most // (dtype.itemsize if isinstance(dtype, DType) else 2))


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


def scattered_inside(node: Node, mesh: Mesh) -> tuple[Type, ...]:
    """Sums along the inner data axis, each rank keeping its shard; along the outer one they are still to be added."""
    kind = _operand(node, mesh)
    if node.kwargs or kind.placement not in ((Partial("sum"),) * 2, (Partial("mean"),) * 2):
        raise TypeRuleError(f"reduces what is placed P(sum) or P(mean) along two data axes, not {kind}")
    return (kind.contiguous().at(kind.placement[0], Shard(0)).promised(),)


def exchanged_outside(node: Node, mesh: Mesh) -> tuple[Type, ...]:
    """Codes by makers: of this rank's part, what each rank that holds the same shard has made."""
    return (_own_codes(node, mesh).promised(),)


def gathered_outside(node: Node, mesh: Mesh) -> tuple[Type, ...]:
    """Codes of all parts of a shard, of which each rank that holds it has one."""
    kind = _own_codes(node, mesh)
    made = TensorType(DType.u8, (num_copies(mesh) * int(kind.numel),), placement=(Replicate(), Shard(0)))
    return (made.promised(),)


def _own_codes(node: Node, mesh: Mesh) -> TensorType:
    kind = _operand(node, mesh)
    if node.kwargs or kind.dtype is not DType.u8 or kind.placement != (Varying(), Shard(0)) or len(kind.shape) != 1:
        raise TypeRuleError(f"takes codes u8[bytes]<V, S0> along the outer data axis, not {kind}")
    if not Shard(0).divides(kind.shape[0], num_shards(mesh)):
        raise TypeRuleError(f"takes as many bytes of each of {num_shards(mesh)} shards, not {kind}")
    return kind


def decoded(node: Node, mesh: Mesh) -> tuple[Type, ...]:
    """Type of what codes stand for: reduced over the ranks that made them, or each part as it is."""
    codec = codec_of(node)
    made = node.results[0].type if len(node.results) == 1 else None
    if not isinstance(made, TensorType) or (made.dtype not in CODED and made.dtype is not DType.f64):
        raise TypeRuleError("makes one tensor of floating-point numbers")
    if isinstance(codec, Sized) or node.option("copies") is not None:
        return _decoded_sized(node, mesh, codec, made)
    kind, reduce = _operand(node, mesh), node.option("reduce")
    if reduce not in ("sum", "mean", None):
        raise TypeRuleError(f"reduces to sum or mean, not {reduce!r}")
    if num_copies(mesh) > 1 and kind.is_sharded:
        return _decoded_outside(codec, kind, made, mesh, reduces=reduce is not None)
    parts, size = num_shards(mesh), num_shards(mesh) * code_bytes(codec, made, mesh)
    shape, before, after = ((parts, size), Shard(1), Shard(0)) if reduce else ((size,), Replicate(), Replicate())
    others = () if reduce else (Replicate(),) * (len(mesh) - 1)
    if (kind.dtype, kind.shape, kind.placement) != (DType.u8, shape, (*others, before)):
        wanted = TensorType(DType.u8, shape, placement=(*others, before))
        raise TypeRuleError(f"makes {made.at(*others, after)} of {wanted}, not of {kind}")
    return (made.contiguous().at(*others, after),)


def _decoded_outside(
    codec: Codec, kind: TensorType, made: TensorType, mesh: Mesh, *, reduces: bool
) -> tuple[Type, ...]:
    """A rank's part of its shard, of the codes of all makers; or its shard, of the codes of all parts."""
    outer: Placement = Varying() if reduces else Replicate()
    size = num_copies(mesh) * code_bytes(codec, made, mesh) if reduces else _outer_bytes(codec, made, mesh)
    is_part = not reduces or (len(made.shape) == 1 and Shard(0).divides(made.shape[0], num_shards(mesh)))
    wanted = TensorType(DType.u8, (num_shards(mesh) * size,), placement=(outer, Shard(0)))
    if not is_part or (kind.dtype, kind.shape, kind.placement) != (DType.u8, wanted.shape, wanted.placement):
        raise TypeRuleError(f"makes {made.at(outer, Shard(0))} of {wanted}, not of {kind}")
    return (made.contiguous().at(outer, Shard(0)),)


def _operand(node: Node, mesh: Mesh) -> TensorType:
    kind = _tensor(node)
    if not 1 <= len(data_axes(mesh)) == len(mesh) <= 2:
        raise TypeRuleError(f"needs a mesh of one or two data axes, not of {', '.join(a.name for a in mesh)}")
    return kind


def _tensor(node: Node) -> TensorType:
    if len(node.operands) != 1 or not isinstance(kind := node.operands[0].type, TensorType):
        raise TypeRuleError("takes one tensor")
    if kind.future or kind.is_on_host:
        raise TypeRuleError(f"takes what is on the device, not {kind}")
    return kind


def _check_copies(node: Node, codec: Codec) -> None:
    """Copies are what `delta` and `difference` change; `raw` stands for them where numbers are checked."""
    changes = isinstance(codec, Sized) and codec.changes
    if node.option("copies") is None and changes:
        raise TypeRuleError(f"{codec.name} needs copies=, the names of the parameters that it changes")
    if node.option("copies") is not None and not changes and not isinstance(codec, Raw):
        raise TypeRuleError(f"{codec} changes no copies: leave copies= out")
    _check_names(node, "copies")


def _check_names(node: Node, option: str) -> None:
    names = node.option(option)
    if names is None:
        return
    if not isinstance(names, tuple) or not names or not all(isinstance(n, str) for n in names):
        raise TypeRuleError(f"needs {option}= to be the names of parameters")
    if len(set(map(str, names))) < len(names):
        raise TypeRuleError(f"names a parameter twice in {option}=")
