"""The option `compress`: the codecs of gradients and of parameters, and what they do not go with."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh

from zgraph.bridge.aten import FROM_TORCH, compute_dtype
from zgraph.errors import UsageError
from zgraph.ir.codecs import CODECS, LOSSY, Q2, Codec, Exact, Sign, TopK, parse_codec
from zgraph.ir.coded_rules import CODED
from zgraph.options.parallel import AXES
from zgraph.passes.core.recipes import EXACT, compressing

Compress = str | Codec | Mapping[str, str | Codec] | None
"""A codec of gradients or its text, or "auto"; "exact", "delta" or "exponent" for parameters; or {"gradients": ...,
"parameters": ...}. None sends numbers as they are."""


@dataclass(frozen=True)
class Codes:
    """Codes that are sent in the place of numbers.

    Args:
        gradients: the text of their codec, or "auto"; empty for none.
        parameters: likewise, or "exact".
    """

    gradients: str = ""
    parameters: str = ""

    def __bool__(self) -> bool:
        return bool(self.gradients or self.parameters)

    def __str__(self) -> str:
        """As whoever compiles writes it."""
        if not self.parameters:
            return f'compress="{self.gradients}"'
        if not self.gradients and self.is_exact:
            return f'compress="{self.parameters}"'
        given = {"gradients": self.gradients, "parameters": self.parameters}
        return f"compress={ {key: text for key, text in given.items() if text} }"

    @property
    def is_exact(self) -> bool:
        """Whether parameters are coded exactly."""
        return self.parameters in EXACT


def codes_for(compress: Compress, mesh: DeviceMesh | None, *, has_recipe: bool, fullgraph: object) -> Codes:
    """Codes that the option asks for; none on one rank.

    Raises:
        CodecError: a text does not parse.
        UsageError: it is no codec, or one that the other options leave no place for.
    """
    codes = codes_of(compress)
    if not codes:
        return codes
    if has_recipe:
        wanted = compressing("broadcast,", codes.gradients, codes.parameters).removesuffix(",broadcast,")
        raise UsageError(
            f"with passes=, the recipe says what is compressed: put {wanted} behind bucket in it, and leave compress= "
            "out"
        )
    if fullgraph == "eager":
        raise UsageError(
            f'{codes} codes what captured graphs send, and fullgraph="eager" captures none; leave one of them out'
        )
    if mesh is None or mesh.size() == 1:
        return Codes()
    names = mesh.mesh_dim_names or ()
    if set(AXES) & set(names):
        raise UsageError(
            f"{codes} codes whole parameters and gradients, and the mesh cuts them along {' and '.join(names)}; leave "
            "compress= out"
        )
    return codes


def check_parameters(
    codes: Codes,
    parameters: Iterable[tuple[str, torch.nn.Parameter]],
    stages: Mapping[str, int],
    dtype: torch.dtype | None,
    device: torch.device,
) -> None:
    """Refuse a codec of parameters that codes none of these, or that some of them cannot have.

    Args:
        codes: what is coded, and how.
        parameters: by name.
        stages: of each.
        dtype: to compute in; None takes each parameter's own.
        device: of the model.

    Raises:
        UsageError: no parameter is of its stages and dtypes, or its codes need a copy that stage 3 does not keep; or
            they are of a length of their own, on a GPU.
    """
    kinds = {name: FROM_TORCH.get(compute_dtype(p, dtype)) for name, p in parameters}
    kind = CODECS.get(codes.parameters) if codes.is_exact else None
    is_sized = codes.is_exact or any(stages[name] in (1, 2) for name in kinds)
    if codes.parameters and is_sized and device.type != "cpu":
        raise UsageError(
            f"{codes} sends codes of parameters whose length is their own, on processors alone, and the model is on "
            f"{device}; leave parameters out (in a configuration zero_quantized_weights), or take q8 or q4 at stage 3"
        )
    if kind is not None and issubclass(kind, Exact):
        wanted = (1, 2) if kind.changes else (3,)
        if any(stages[name] in wanted and found in kind.dtypes for name, found in kinds.items()):
            return
        raise UsageError(
            f"{codes} codes parameters of stage {' and '.join(map(str, wanted))} that are computed with in "
            f'{" or ".join(d.value for d in kind.dtypes)}, and there is none: pass param_dtype="bf16", or take '
            'compress="exact", which chooses a codec'
        )
    if not codes.parameters or codes.is_exact:
        return
    if not any(stages[name] for name in kinds):
        raise UsageError(f"{codes} codes parameters that are gathered, and at stage 0 none is; leave parameters out")
    if not any(stages[name] and found in CODED for name, found in kinds.items()):
        raise UsageError(
            f"{codes} codes numbers in {', '.join(d.value for d in CODED)}, and no parameter is computed with in one "
            "of them; leave parameters out"
        )
    again = next((name for name in kinds if stages[name] == 3), None)
    if again is not None and isinstance(parse_codec(codes.parameters), Q2 | Sign | TopK):
        raise UsageError(
            f"{codes} codes what changed in a parameter that all ranks still have (stages 1 and 2), and {again} is of "
            "stage 3; take q8 or q4, or stage 2"
        )


def planned_codes(compress: Compress, stages: Collection[int], tensor_parallel: int) -> Codes:
    """Codes of a plan.

    Args:
        compress: the option.
        stages: that are planned.
        tensor_parallel: ranks that compute each op together.

    Raises:
        CodecError: a text does not parse.
        UsageError: it is no codec, or ranks compute ops together.
    """
    codes = codes_of(compress)
    if codes and tensor_parallel > 1:
        raise UsageError(f"{codes} codes what ranks compute alone; leave compress= or the parallelism out")
    if codes.parameters in ("", *EXACT):
        return codes
    if 0 in stages:
        raise UsageError(f"{codes} codes parameters that are gathered, and at stage 0 none is: give stage=, without 0")
    if 3 in stages and isinstance(parse_codec(codes.parameters), Q2 | Sign | TopK):
        raise UsageError(
            f"{codes} codes what changed in parameters that all ranks still have: give stage=, of 1 and 2, or take q8 "
            "or q4"
        )
    return codes


def codes_of(compress: object) -> Codes:
    """Codes that an option `compress` asks for.

    Raises:
        CodecError: a text does not parse.
        UsageError: it is no codec.
    """
    if compress is None or isinstance(compress, str | Codec):
        text = _text(compress, "compress", ("auto", *EXACT))
        return Codes(parameters=text) if text in EXACT else Codes(text)
    if not isinstance(compress, Mapping) or not set(compress) <= {"gradients", "parameters"}:
        raise UsageError(
            'compress must be a codec such as "q8(block=256)", "exact", "auto", None, or {"gradients": "q4", '
            f'"parameters": "q8"}}, not {compress!r}'
        )
    gradients = _text(compress.get("gradients"), 'compress["gradients"]', ("auto",))
    return Codes(gradients, _text(compress.get("parameters"), 'compress["parameters"]', EXACT))


def _text(codec: object, name: str, words: Collection[str]) -> str:
    """The text of a codec that leaves something out, or one of the words; empty for None.

    Raises:
        CodecError: the text does not parse.
        UsageError: it is something else.
    """
    if codec is None or codec in words:
        return str(codec or "")
    if not isinstance(codec, str | Codec):
        raise UsageError(f'{name} must be a codec such as "q8(block=256)", {", ".join(words)}, or None, not {codec!r}')
    found = parse_codec(codec) if isinstance(codec, str) else codec
    if found.name in words:
        return found.name
    if found.name not in LOSSY:
        raise UsageError(f"{name} takes {', '.join((*LOSSY, *words))}, not {found}; leave it out to send numbers")
    return str(found)
