"""Stochastic rounding to bfloat16: up with the probability of what is cut off, so that small updates are not lost
(Gupta et al.: "Deep learning with limited numerical precision", 2015). Draws are a function of the place."""

from __future__ import annotations

import torch

from zgraph.codegen.philox import words

_PER_POSITION = 8
"""Draws of 16 bits in four words of 32."""


def stochastic(values: torch.Tensor, seed: int, step: int, number: int, start: int) -> torch.Tensor:
    """The values in bfloat16, each rounded up or down at random; infinities and what is no number stay.

    Draws depend on the arguments and on an element's place alone: parts of a tensor come out as they do in the whole.

    Args:
        values: fp32, in one dimension.
        seed: at least 0.
        step: of the training.
        number: of the parameter.
        start: the place of the first value in the whole parameter.
    """
    draws = _draws(values.numel(), seed, step, number, start, values.device)
    bits = (values.view(torch.int32) + draws) & -(1 << 16)
    return torch.where(values.isfinite(), bits.view(torch.float32), values).to(torch.bfloat16)


def _draws(numel: int, seed: int, step: int, number: int, start: int, device: torch.device) -> torch.Tensor:
    """16 random bits for each place from `start` on, in an i32."""
    first, last = start // _PER_POSITION, -(-(start + numel) // _PER_POSITION)
    found = words(seed, torch.arange(first, last, device=device), step, number)
    halves = torch.stack([word.to(torch.int32) for word in found], dim=1).view(torch.int16).view(-1)
    skipped = start - first * _PER_POSITION
    return halves[skipped : skipped + numel].to(torch.int32) & 0xFFFF
