"""Random numbers that are a function of a seed and a position, so that none has to be kept: Philox, as Triton has it.

Salmon et al.: "Parallel random numbers: as easy as 1, 2, 3", 2011; 4 words of 32 bits, 10 rounds.
"""

from __future__ import annotations

import torch

_LOW = 0xFFFFFFFF
_KEYS = 0x9E3779B9, 0xBB67AE85
_FACTORS = 0xD2511F53, 0xCD9E8D57
_SCALE = 4.6566127342e-10
"""Below 2^-31, so that no number comes to 1."""


def uniform(seed: torch.Tensor, numel: int) -> torch.Tensor:
    """`tl.rand(seed, offset)` for the offsets from 0 to `numel`: fp32 in [0, 1), to the last bit.

    Args:
        seed: i64 [], at least 0.
        numel: how many.
    """
    at = torch.arange(numel, device=seed.device)
    c0, c1 = at & _LOW, at >> 32
    c2 = c3 = torch.zeros_like(at)
    k0, k1 = seed & _LOW, seed >> 32
    for _ in range(10):
        first, second = c0 * _FACTORS[0], c2 * _FACTORS[1]  # 64 bits of a product, whatever their sign
        c0, c2 = ((second >> 32) & _LOW) ^ c1 ^ k0, ((first >> 32) & _LOW) ^ c3 ^ k1
        c1, c3 = second & _LOW, first & _LOW
        k0, k1 = (k0 + _KEYS[0]) & _LOW, (k1 + _KEYS[1]) & _LOW
    signed = torch.where(c0 >= 1 << 31, (1 << 32) - 1 - c0, c0)
    return signed.to(torch.int32).float() * _SCALE
