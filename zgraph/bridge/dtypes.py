"""A dtype as a user gives it: torch's own, or a word for it."""

from __future__ import annotations

import torch

from zgraph.bridge.aten import FROM_TORCH
from zgraph.errors import DtypeError

Dtype = torch.dtype | str
"""Dtype as options take it: a torch dtype, or a name."""

WORDS = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "f16": torch.float16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "half": torch.float16,
    "f32": torch.float32,
    "fp32": torch.float32,
    "float32": torch.float32,
    "float": torch.float32,
    "f64": torch.float64,
    "fp64": torch.float64,
    "float64": torch.float64,
    "double": torch.float64,
}
"""Floating-point dtypes by what they are called here, by torch, by numpy and by DeepSpeed."""

NAMES = ("bf16", "f16", "f32", "f64")
"""One word for each."""


def as_dtype(given: Dtype, option: str) -> torch.dtype:
    """The floating-point dtype that a user means: `torch.bfloat16`, "bf16", "bfloat16", "torch.bfloat16", ...

    Args:
        given: a dtype, or one of `WORDS`, in small letters or in others, with `torch.` before it or without.
        option: what took it, for the error.

    Raises:
        DtypeError: it is none, or none to compute in.
    """
    found = WORDS.get(given.strip().lower().removeprefix("torch.")) if isinstance(given, str) else given
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found not in FROM_TORCH:
        raise DtypeError(
            f"{option} is one of {', '.join(NAMES)} (or torch.bfloat16, float16, fp32, ...): floating-point, not "
            f"{given if isinstance(given, torch.dtype) else repr(given)}"
        )
    return found


def as_dtype_or_none(given: Dtype | None, option: str) -> torch.dtype | None:
    """The same, where None leaves each tensor its own. Raises DtypeError as `as_dtype`."""
    return None if given is None else as_dtype(given, option)
