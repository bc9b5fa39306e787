"""Codes of a codec as torch's operations make them, beside which other ways are held."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from zgraph.bridge import compiled_codecs
from zgraph.bridge.codecs import add_decoded, encode_into
from zgraph.ir import DType
from zgraph.ir.codecs import Codec

SPECIAL = [0.0, -0.0, 1e-45, -3e-41, 1.1754944e-38, 3.4e38, -3.4e38, float("inf"), float("-inf"), float("nan")]
"""Numbers that a codec may get wrong."""


def numbers(
    numel: int, seed: int, special: Sequence[float], *, has_rest: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Two rows of numbers of very different magnitudes, with some that are special; and rests."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, numel, generator=generator) * torch.rand(2, numel, generator=generator).mul(60).sub(40).exp2()
    x[seed % 2, torch.randint(numel, (len(special),), generator=generator)] = torch.tensor([*special])
    return x, torch.randn(2, numel, generator=generator) if has_rest else None


def coded(codec: Codec, x: torch.Tensor, rest: torch.Tensor | None) -> list[torch.Tensor]:
    """Codes, what they add to ones, and rests."""
    code = torch.full((len(x), codec.num_bytes(x.shape[1], DType.f32)), 7, dtype=torch.uint8)
    left = None if rest is None else rest.clone()
    encode_into(codec, x, code, left)
    total = add_decoded(codec, code, torch.ones(x.shape))
    return [code, total] if left is None else [code, total, left]


def by_torch(codec: Codec, x: torch.Tensor, rest: torch.Tensor | None) -> list[torch.Tensor]:
    """The same by torch's operations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled_codecs, "encode_row", lambda *_: False)
        patch.setattr(compiled_codecs, "add_row", lambda *_: False)
        return coded(codec, x, rest)


def are_alike(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    """Whether all are the same to the last bit; NaN is NaN."""
    pairs = zip(found, expected, strict=True)
    return all(torch.equal(a, b) or torch.equal(a.nan_to_num(3.0), b.nan_to_num(3.0)) for a, b in pairs)
