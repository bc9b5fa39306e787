"""Newton-Schulz iterations towards the orthogonal factor of a matrix, as Muon takes them (K. Jordan et al.: "Muon: An
optimizer for hidden layers in neural networks", 2024)."""

from __future__ import annotations

import math
from typing import Literal

import torch

Coefficients = tuple[float, float, float]
AdjustLr = Literal["original", "match_rms_adamw"]

COEFFICIENTS: Coefficients = (3.4445, -4.7750, 2.0315)
"""Of the odd quintic whose slope at zero is steep: singular values come to between 0.7 and 1.2, not to 1."""


def orthogonalised(
    matrix: torch.Tensor, steps: int, coefficients: Coefficients = COEFFICIENTS, eps: float = 1e-7
) -> torch.Tensor:
    """The matrix with singular values near 1, in its own dtype: the numbers of `torch.optim.Muon` in bfloat16.

    Args:
        matrix: [m, n], not changed.
        steps: iterations.
        coefficients: a, b, c of X <- a X + (b A + c A A) X with A = X X^T.
        eps: the least norm to divide by.
    """
    a, b, c = coefficients
    is_tall = matrix.shape[0] > matrix.shape[1]
    found = matrix.T if is_tall else matrix
    found = found / found.norm().clamp(min=eps)
    for _ in range(steps):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.T if is_tall else found


def flop(rows: int, columns: int, steps: int) -> int:
    """Floating-point operations of that.

    >>> flop(2, 3, 1)
    64
    """
    short, long = sorted((rows, columns))
    return steps * (4 * short * short * long + 2 * short**3)


def adjusted_lr(lr: float, rows: int, columns: int, how: AdjustLr) -> float:
    """The learning rate for a matrix of this shape.

    Args:
        how: "original" has updates of one size in the spectral norm whatever the shape (Jordan); "match_rms_adamw"
            has them as large as AdamW's, entry by entry (Liu et al.: "Muon is Scalable for LLM Training", 2025).
    """
    if how == "original":
        return lr * math.sqrt(max(1, rows / columns))
    return lr * 0.2 * math.sqrt(max(rows, columns))
