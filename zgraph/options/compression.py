"""The option `compress`: the codec of gradients, and what it does not go with."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh

from zgraph.errors import UsageError
from zgraph.ir.codecs import Codec, Raw, parse_codec

Compress = str | Codec | None
"""A codec or its text, or "auto"; None sends numbers as they are."""


def codec_for(compress: Compress, mesh: DeviceMesh | None, *, has_recipe: bool, fullgraph: object) -> str:
    """The text of the codec of gradients, or "auto"; empty where there is none, or one rank.

    Raises:
        CodecError: the text does not parse.
        UsageError: it is no codec, or one that the other options leave no place for.
    """
    codec = _checked(compress)
    if not codec:
        return ""
    if has_recipe:
        raise UsageError(
            f"with passes=, the recipe says what is compressed: put compress(gradients={codec}) behind bucket in it, "
            "and leave compress= out"
        )
    if fullgraph == "eager":
        raise UsageError(
            f'compress="{codec}" codes gradients of captured backwards, and fullgraph="eager" captures none; leave one '
            "of them out"
        )
    if mesh is not None and mesh.ndim > 1 and sum(mesh.size(d) > 1 for d in range(mesh.ndim)) > 1:
        raise UsageError(
            f'compress="{codec}" codes gradients along one axis of ranks, and the mesh has {mesh.ndim}; leave '
            "compress= out, or pass a mesh of one axis"
        )
    return codec if mesh is not None and mesh.size() > 1 else ""


def planned_codec(compress: Compress, num_copies: int, tensor_parallel: int) -> str:
    """The text of the codec of gradients for a plan, or "auto"; empty where there is none.

    Args:
        compress: the option.
        num_copies: ranks that hold the same shard.
        tensor_parallel: ranks that compute each op together.

    Raises:
        CodecError: the text does not parse.
        UsageError: it is no codec, or the mesh has more than one axis.
    """
    codec = _checked(compress)
    if codec and (num_copies > 1 or tensor_parallel > 1):
        raise UsageError(
            f'compress="{codec}" codes gradients along one axis of ranks; leave compress=, or mesh= and '
            "tensor_parallel=, out"
        )
    return codec


def _checked(compress: object) -> str:
    if compress is None or compress == "auto":
        return compress or ""
    if not isinstance(compress, str | Codec):
        raise UsageError(f'compress must be a codec such as "q8(block=256)", "auto" or None, not {compress!r}')
    codec = parse_codec(compress) if isinstance(compress, str) else compress
    if isinstance(codec, Raw):
        raise UsageError('compress="raw" would send the numbers themselves; leave compress= out')
    return str(codec)
