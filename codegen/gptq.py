"""Weights in int4, rounded so that the layer's outputs on a text change least.

This is GPTQ (Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers", ICLR 2023, algorithm 1): columns are rounded one after the other, and the error of each is
made up for by those that are left, as the second moments of the layer's inputs say. Updates of columns behind a block
are put off until the block is done.

Columns with the largest inputs come first, while many are left to make up for them (`--act-order` of GPTQ's own code).
Groups are of neighbours all the same, as their scales are found before: the two ends of each range are drawn in apart,
and errors count as much as the inputs that they meet are large. Afterwards scales and middles are fitted to the
integers by least squares, and the integers to these, one column after the other (coordinate descent, as in Behdin et
al., "QuantEase", 2023), each of which can only lessen the error.
"""

from __future__ import annotations

import torch

from zgraph.codegen import quantised

Tensor = torch.Tensor

DAMPING = 0.01
"""Part of the mean second moment that is added to each, so that the matrix can be inverted."""

ENDS = (1.0, 0.94, 0.88, 0.82, 0.75)
"""Parts of a range's ends that are tried, each with each."""

BLOCK = 64
"""Columns whose updates of others are put off."""

ROUNDS = 2
"""How often scales and integers are fitted to each other."""


def gptq(w: Tensor, moments: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """A weight as int4.

    Args:
        w: [outputs, columns]; `group` divides columns.
        moments: [columns, columns], the sum over tokens of products of two columns of the layer's inputs.
        group: columns that share a scale.

    Returns:
        int32 [outputs, columns] from 0 to 15; bf16 [columns / group, outputs, 2], as of `quantised.nearest`.
    """
    fitting = _Fitting(w.float(), _damped(moments), group)
    fitting.round_in_order()
    for _ in range(ROUNDS):
        fitting.fit_scales()
        fitting.fit_integers()
    scales = torch.stack([fitting.scale.t(), fitting.middle.t()], 2)
    return fitting.integers.int(), scales.bfloat16()


class _Fitting:
    """A weight on its way to integers.

    Args:
        w: fp32 [outputs, columns].
        moments: fp64 [columns, columns], damped.
        group: columns that share a scale.

    Attributes:
        integers: from 0 to 15, [outputs, columns].
        scale, middle: [outputs, groups], numbers of bf16.
    """

    def __init__(self, w: Tensor, moments: Tensor, group: int) -> None:
        self.w, self.group = w, group
        self.moments, self.factor_of = moments.float(), moments
        self.scale, self.middle = _grids(w, self.moments.diagonal(), group)
        self.integers = torch.zeros_like(w)

    def round_in_order(self) -> None:
        """GPTQ's rounding."""
        order = torch.argsort(self.moments.diagonal(), descending=True)
        factor = _factor(self.factor_of[order][:, order])
        left, count = self.w[:, order].clone(), len(order)
        for begin in range(0, count, BLOCK):
            end = min(begin + BLOCK, count)
            errors = left.new_zeros(len(left), end - begin)
            for at in range(begin, end):
                column, exact = int(order[at]), left[:, at]
                found = self.nearest(exact, column)
                error = (exact - self.number(found, column)) / factor[at, at]
                self.integers[:, column], errors[:, at - begin] = found, error
                left[:, at + 1 : end].addr_(error, factor[at, at + 1 : end], alpha=-1)
            left[:, end:].addmm_(errors, factor[begin:end, end:], alpha=-1)

    def fit_scales(self) -> None:
        """Scales and middles of each group by least squares, rounded to bf16, where that lessens the error."""
        pull = (self.numbers() - self.w) @ self.moments
        for number in range(self.scale.shape[1]):
            own = slice(number * self.group, (number + 1) * self.group)
            among, steps = self.moments[own, own], self.integers[:, own] - 8
            turned = steps @ among
            a, b, c = (turned * steps).sum(1), turned.sum(1), among.sum()
            p, q = (pull[:, own] * steps).sum(1), pull[:, own].sum(1)
            whole = (a * c - b * b).clamp_min(quantised.EPS)
            scale = (self.scale[:, number] - (p * c - q * b) / whole).bfloat16().float()
            middle = (self.middle[:, number] - (a * q - b * p) / whole).bfloat16().float()
            change = steps * (scale - self.scale[:, number])[:, None] + (middle - self.middle[:, number])[:, None]
            gain = 2 * (change * pull[:, own]).sum(1) + ((change @ among) * change).sum(1)
            is_better = (gain < 0) & (scale > 0)
            self.scale[:, number] = torch.where(is_better, scale, self.scale[:, number])
            self.middle[:, number] = torch.where(is_better, middle, self.middle[:, number])
            pull += torch.where(is_better[:, None], change, 0.0) @ self.moments[own]

    def fit_integers(self) -> None:
        """Each column's integers where the error is least, as long as all others stay."""
        numbers, diagonal = self.numbers(), self.moments.diagonal()
        pull = (numbers - self.w) @ self.moments
        for begin in range(0, self.w.shape[1], BLOCK):
            own = slice(begin, min(begin + BLOCK, self.w.shape[1]))
            near = pull[:, own].clone()
            changes = torch.zeros_like(near)
            for at, column in enumerate(range(own.start, own.stop)):
                found = self.nearest(numbers[:, column] - near[:, at] / diagonal[column], column)
                changes[:, at] = self.number(found, column) - numbers[:, column]
                self.integers[:, column] = found
                near.addr_(changes[:, at], self.moments[column, own])
            pull.addmm_(changes, self.moments[own])

    def nearest(self, exact: Tensor, column: int) -> Tensor:
        """The integers that are nearest to numbers of a column."""
        number = column // self.group
        return ((exact - self.middle[:, number]) / self.scale[:, number] + 8).round().clamp(0, 15)

    def number(self, integers: Tensor, column: int) -> Tensor:
        """The numbers that integers of a column stand for."""
        number = column // self.group
        return (integers - 8) * self.scale[:, number] + self.middle[:, number]

    def numbers(self) -> Tensor:
        """All of them."""
        groups = self.integers.view(len(self.w), -1, self.group) - 8
        return (groups * self.scale[..., None] + self.middle[..., None]).view_as(self.w)


def _grids(w: Tensor, importance: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Scales and middles, [outputs, groups]: those of a few whose rounding to the nearest errs least.

    Args:
        w: [outputs, columns].
        importance: [columns], what the squared errors of each are multiplied by.
        group: columns that share a scale.
    """
    groups, counts = w.view(len(w), -1, group), importance.view(1, -1, group)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    best = torch.full_like(low, torch.inf)
    scales, middles = torch.ones_like(low), torch.zeros_like(low)
    for below in ENDS:
        for above in ENDS:
            first, last = low * below, high * above
            scale = ((last - first) / 15).clamp_min(quantised.EPS).bfloat16().float()
            middle = ((first + last) / 2 + scale / 2).bfloat16().float()
            found = ((groups - middle) / scale + 8).round().clamp(0, 15)
            error = ((groups - (found - 8) * scale - middle).square() * counts).sum(2, keepdim=True)
            is_better = error < best
            best = torch.where(is_better, error, best)
            scales, middles = torch.where(is_better, scale, scales), torch.where(is_better, middle, middles)
    return scales[..., 0], middles[..., 0]


def _damped(moments: Tensor) -> Tensor:
    """The moments in fp64, with more on the diagonal. Columns that are always zero stand for themselves."""
    wide = moments.double().clone()
    diagonal = wide.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += DAMPING * diagonal.mean()
    return wide


def _factor(moments: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the moments, fp32."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()
