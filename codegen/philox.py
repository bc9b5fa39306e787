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

Word = torch.Tensor | int
Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def words(seed: Word, at: torch.Tensor, second: Word = 0, third: Word = 0) -> Words:
    """Four random words for each position, each a number of 32 bits in an i64.

    Args:
        seed: at least 0.
        at: i64, positions, at least 0.
        second: of 32 bits, as is the next: with another number here, all words are others.
    """
    c0, c1 = at & _LOW, at >> 32
    c2, c3 = (torch.zeros_like(at) + more for more in (second, third))
    k0, k1 = seed & _LOW, seed >> 32
    for _ in range(10):
        low, high = c0 * _FACTORS[0], c2 * _FACTORS[1]  # 64 bits of a product, whatever their sign
        c0, c2 = ((high >> 32) & _LOW) ^ c1 ^ k0, ((low >> 32) & _LOW) ^ c3 ^ k1
        c1, c3 = high & _LOW, low & _LOW
        k0, k1 = (k0 + _KEYS[0]) & _LOW, (k1 + _KEYS[1]) & _LOW
    return c0, c1, c2, c3


def uniform(seed: torch.Tensor, numel: int) -> torch.Tensor:
    """`tl.rand(seed, offset)` for the offsets from 0 to `numel`: fp32 in [0, 1), to the last bit.

    Args:
        seed: i64 [], at least 0.
        numel: how many.
    """
    word = words(seed, torch.arange(numel, device=seed.device))[0]
    signed = torch.where(word >= 1 << 31, (1 << 32) - 1 - word, word)
    return signed.to(torch.int32).float() * _SCALE
