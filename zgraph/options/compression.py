"""The option `compress`: the codec of gradients, and what it does not go with."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh

from zgraph.errors import UsageError
from zgraph.ir.codecs import Codec, Raw, parse_codec

Compress = str | Codec | None
"""A codec or its text; None sends numbers as they are."""


def codec_for(compress: Compress, mesh: DeviceMesh | None, *, has_recipe: bool, fullgraph: object) -> str:
    """The text of the codec of gradients; empty where there is none, or one rank.

    Raises:
        CodecError: the text does not parse.
        UsageError: it is no codec, or one that the other options leave no place for.
    """
    if compress is None:
        return ""
    if not isinstance(compress, str | Codec):
        raise UsageError(f'compress must be a codec such as "q8(block=256)", or None, not {compress!r}')
    codec = parse_codec(compress) if isinstance(compress, str) else compress
    if isinstance(codec, Raw):
        raise UsageError('compress="raw" would send the numbers themselves; leave compress= out')
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
    return str(codec) if mesh is not None and mesh.size() > 1 else ""
