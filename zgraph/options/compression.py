"""The option `compress`: the codec of gradients, or of parameters if it is exact, and what it does not go with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch.distributed.device_mesh import DeviceMesh

from zgraph.bridge.aten import FROM_TORCH, compute_dtype
from zgraph.errors import UsageError
from zgraph.ir.codecs import CODECS, Codec, Delta, Raw, Sized, parse_codec
from zgraph.options.parallel import AXES
from zgraph.passes.core.recipes import EXACT

Compress = str | Codec | None
"""A codec or its text, "auto" or "exact"; None sends numbers as they are."""


def codec_for(
    compress: Compress, mesh: DeviceMesh | None, *, has_recipe: bool, fullgraph: object, device: torch.device
) -> str:
    """The text of the codec, "auto" or "exact"; empty where there is none, or one rank.

    Raises:
        CodecError: the text does not parse.
        UsageError: it is no codec, or one that the other options leave no place for.
    """
    codec = _checked(compress)
    if not codec:
        return ""
    is_exact = codec in EXACT
    if has_recipe:
        wanted = f"code-gathers(codec={EXACT[codec]})" if is_exact else f"compress(gradients={codec})"
        raise UsageError(
            f"with passes=, the recipe says what is compressed: put {wanted} behind bucket in it, and leave compress= "
            "out"
        )
    if fullgraph == "eager":
        raise UsageError(
            f'compress="{codec}" codes what captured graphs send, and fullgraph="eager" captures none; leave one of '
            "them out"
        )
    if is_exact and device.type != "cpu":
        raise UsageError(
            f'compress="{codec}" codes parameters on processors, and the model is on {device}; leave it out'
        )
    if is_exact and mesh is not None and set(AXES) & set(mesh.mesh_dim_names or ()):
        raise UsageError(
            f'compress="{codec}" codes whole parameters, and the mesh cuts them along '
            f"{' and '.join(mesh.mesh_dim_names or ())}; leave compress= out"
        )
    if not is_exact and mesh is not None and mesh.ndim > 1 and sum(mesh.size(d) > 1 for d in range(mesh.ndim)) > 1:
        raise UsageError(
            f'compress="{codec}" codes gradients along one axis of ranks, and the mesh has {mesh.ndim}; leave '
            "compress= out, or pass a mesh of one axis"
        )
    return codec if mesh is not None and mesh.size() > 1 else ""


def check_exact(
    codec: str,
    parameters: Iterable[tuple[str, torch.nn.Parameter]],
    stages: Mapping[str, int],
    dtype: torch.dtype | None,
) -> None:
    """Refuse an exact codec that codes none of these parameters.

    Args:
        codec: its text.
        parameters: by name.
        stages: of each.
        dtype: to compute in; None takes each parameter's own.

    Raises:
        UsageError: no parameter is of its stages and dtypes.
    """
    kind = CODECS.get(codec)
    if kind is None or not issubclass(kind, Sized):
        return
    wanted = (1, 2) if issubclass(kind, Delta) else (3,)
    if any(stages[n] in wanted and FROM_TORCH.get(compute_dtype(p, dtype)) in kind.dtypes for n, p in parameters):
        return
    raise UsageError(
        f'compress="{codec}" codes parameters of stage {" and ".join(map(str, wanted))} that are computed with in '
        f'{" or ".join(d.value for d in kind.dtypes)}, and there is none: pass param_dtype="bf16", or take '
        'compress="exact", which chooses a codec'
    )


def planned_codec(compress: Compress, num_copies: int, tensor_parallel: int) -> str:
    """The text of the codec for a plan, "auto" or "exact"; empty where there is none.

    Args:
        compress: the option.
        num_copies: ranks that hold the same shard.
        tensor_parallel: ranks that compute each op together.

    Raises:
        CodecError: the text does not parse.
        UsageError: it is no codec, or the mesh has more than one axis.
    """
    codec = _checked(compress)
    if codec and (tensor_parallel > 1 or (num_copies > 1 and codec not in EXACT)):
        raise UsageError(
            f'compress="{codec}" codes along one axis of ranks; leave compress=, or mesh= and tensor_parallel=, out'
        )
    return codec


def _checked(compress: object) -> str:
    if compress is None or compress in ("auto", "exact"):
        return str(compress or "")
    if not isinstance(compress, str | Codec):
        raise UsageError(f'compress must be a codec such as "q8(block=256)", "exact", "auto" or None, not {compress!r}')
    codec = parse_codec(compress) if isinstance(compress, str) else compress
    if isinstance(codec, Raw):
        raise UsageError('compress="raw" would send the numbers themselves; leave compress= out')
    return str(codec)
