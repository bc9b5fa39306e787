"""Weights in int4, rounded so that the layer's outputs on a text change least.

This is GPTQ (Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers", ICLR 2023, algorithm 1): columns are rounded one after the other, and the error of each is
made up for by those that are left, as the second moments of the layer's inputs say. Updates of columns behind a group
are put off until the group is done.
"""

from __future__ import annotations

import torch

from zgraph.codegen import quantised

Tensor = torch.Tensor

DAMPING = 0.01
"""Part of the mean second moment that is added to each, so that the matrix can be inverted."""


def gptq(w: Tensor, moments: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """A weight as int4, in the order of its columns.

    Args:
        w: [outputs, columns]; `group` divides columns.
        moments: [columns, columns], the sum over tokens of products of two columns of the layer's inputs.
        group: columns that share a scale, found as by `quantised.nearest` once the columns before it are rounded.

    Returns:
        int32 [outputs, columns] from 0 to 15; bf16 [columns / group, outputs, 2], as of `quantised.nearest`.
    """
    left, factor = w.float().clone(), _factor(moments)
    integers, scales = torch.zeros_like(left, dtype=torch.int32), list[Tensor]()
    errors = left.new_zeros(len(left), group)
    for begin in range(0, left.shape[1], group):
        end = begin + group
        found = quantised.nearest(left[:, begin:end].contiguous(), group)[1]
        scales.append(found)
        scale, middle = found[0].float().unbind(1)
        for column in range(begin, end):
            exact = left[:, column]
            number = ((exact - middle) / scale + 8).round().clamp(0, 15)
            error = (exact - (number - 8) * scale - middle) / factor[column, column]
            integers[:, column], errors[:, column - begin] = number.int(), error
            left[:, column + 1 : end].addr_(error, factor[column, column + 1 : end], alpha=-1)
        left[:, end:].addmm_(errors, factor[begin:end, end:], alpha=-1)
    return integers, torch.cat(scales)


def _factor(moments: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the moments. Columns that are always zero stand for themselves."""
    wide = moments.double().clone()
    diagonal = wide.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(wide))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()
