"""The cross-entropy of logits, block by block of tokens, and that of a projection, block by block of the vocabulary:
there the logits are never whole in memory.

The forward keeps one number a token, the logarithm of the sum of exponentials, which it brings up to date from block to
block (Milakov, Gimelshein: "Online normalizer calculation for softmax", 2018). The backward makes each block of logits
again: their gradient needs nothing but that number (Wijmans et al.: "Cut your losses in large-vocabulary language
models", 2024). A block of the weight's gradient is one matmul over all tokens, as it is without blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

BLOCK_BYTES = 64 << 20
"""A block of logits in fp32."""

MULTIPLE = 128
"""Columns of a block are a multiple of this: whole tiles of a matmul."""

Tensor = torch.Tensor


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the loss of such logits is computed: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def block_columns(num_tokens: int, num_classes: int) -> int:
    """How many classes a block has."""
    columns = BLOCK_BYTES // (4 * max(num_tokens, 1)) // MULTIPLE * MULTIPLE
    return min(max(columns, MULTIPLE), num_classes)


def cross_entropy(logits: Tensor, target: Tensor, ignore_index: int, mean: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of predicting `target` from logits [..., V], as `linear_cross_entropy` returns it."""
    rows = logits.view(-1, logits.shape[-1])
    lse = rows.new_empty(target.shape, dtype=computed_in(rows.dtype))
    picked = torch.zeros_like(lse)
    for some in _some_rows(rows):
        part = rows[some].to(lse.dtype)
        columns, inside = at(target[some], 0, rows.shape[1])
        lse[some] = part.logsumexp(1)
        picked[some] = torch.where(inside, part.gather(1, columns)[:, 0], math.nan)
    return *_summed(lse - picked, target, ignore_index, mean), lse


def cross_entropy_backward(
    tangent: Tensor, logits: Tensor, target: Tensor, number: Tensor, lse: Tensor, ignore_index: int, mean: bool
) -> Tensor:
    """The gradient of logits, from what `cross_entropy` was given and returned, and the loss's own gradient []."""
    rows, made = logits.view(-1, logits.shape[-1]), torch.empty_like(logits)
    out = made.view(rows.shape)
    scale = _scale(tangent, target, number, ignore_index, mean)
    for some in _some_rows(rows):
        columns, inside = at(target[some], 0, rows.shape[1])
        part = (rows[some].to(lse.dtype) - lse[some, None]).exp_()
        out[some] = part.scatter_add_(1, columns, -inside[:, None].to(lse.dtype)).mul_(scale[some])
    return made


def plain_scratch_bytes(num_tokens: int, num_classes: int) -> int:
    """About the most bytes that either has alive at once, beside what it reads and what it writes."""
    return 2 * 4 * num_classes * min(_num_rows(num_classes), num_tokens)


def _summed(losses: Tensor, target: Tensor, ignore_index: int, mean: bool) -> tuple[Tensor, Tensor]:
    """The loss of all tokens that count, and their number."""
    counts = target != ignore_index
    number = counts.sum().to(losses.dtype)
    loss = torch.where(counts, losses, 0.0).sum()
    return (loss / number if mean else loss), number


def _scale(tangent: Tensor, target: Tensor, number: Tensor, ignore_index: int, mean: bool) -> Tensor:
    """The factor of each token's gradient, [T, 1]."""
    own = tangent.to(number.dtype)
    own = own / number if mean else own
    return torch.where(target != ignore_index, own, 0.0)[:, None]


def _num_rows(num_classes: int) -> int:
    return max(BLOCK_BYTES // (4 * num_classes), 1)


def _some_rows(rows: Tensor) -> Iterator[slice]:
    size = _num_rows(rows.shape[1])
    for begin in range(0, len(rows), size):
        yield slice(begin, begin + size)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, ignore_index: int, mean: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of predicting `target` from `x @ weight.T`.

    Args:
        x: [T, D].
        weight: [V, D].
        target: [T], classes below V, or `ignore_index`.
        ignore_index: a target that counts for nothing.
        mean: divide by the number of targets that count.

    Returns:
        The loss (NaN where a target is no class) and that number, []; the logarithm of the sum of exponentials of each
        token's logits, [T]. All of them in fp32, or in fp64 if `x` is.
    """
    top = x.new_full(target.shape, float("-inf"), dtype=computed_in(x.dtype))
    total, picked = torch.zeros_like(top), torch.full_like(top, math.nan)
    for begin, part in _blocks(x, weight):
        logits = (x @ part.t()).to(top.dtype)
        columns, inside = at(target, begin, len(part))
        picked = torch.where(inside, logits.gather(1, columns)[:, 0], picked)
        higher = torch.maximum(top, logits.amax(1))
        total.mul_(top.sub_(higher).exp_()).add_(logits.sub_(higher[:, None]).exp_().sum(1))
        top = higher
    lse = top + total.log()
    return *_summed(lse - picked, target, ignore_index, mean), lse


def linear_cross_entropy_backward(
    tangent: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    number: Tensor,
    lse: Tensor,
    ignore_index: int,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of `x` and `weight`, from what `linear_cross_entropy` was given and returned, and the loss's own
    gradient [].
    """
    scale = _scale(tangent, target, number, ignore_index, mean)
    dx, dweight = torch.zeros_like(x, dtype=lse.dtype), torch.empty_like(weight)
    for begin, part in _blocks(x, weight):
        logits = (x @ part.t()).to(lse.dtype)
        columns, inside = at(target, begin, len(part))
        gradient = logits.sub_(lse[:, None]).exp_()
        gradient.scatter_add_(1, columns, -inside[:, None].to(lse.dtype)).mul_(scale)
        gradient = gradient.to(x.dtype)
        torch.mm(gradient.t(), x, out=dweight[begin : begin + len(part)])
        dx += gradient @ part
    return dx.to(x.dtype), dweight


def scratch_bytes(num_tokens: int, num_classes: int, width: int, itemsize: int) -> int:
    """About the most bytes that either has alive at once, beside what it reads and what it writes."""
    numel = num_tokens * block_columns(num_tokens, num_classes)
    again = 0 if itemsize == 4 else itemsize
    return numel * (4 + again) + num_tokens * width * (4 + again)


def _blocks(x: Tensor, weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Blocks of the weight's rows, each with the number of its first."""
    columns = block_columns(len(x), len(weight))
    for begin in range(0, len(weight), columns):
        yield begin, weight[begin : begin + columns]


def at(target: Tensor, begin: int, columns: int) -> tuple[Tensor, Tensor]:
    """Where in a block each target lies, [T, 1], and whether it does."""
    found, inside = places(target, begin, columns)
    return found[:, None], inside


def places(classes: Tensor, begin: int, columns: int) -> tuple[Tensor, Tensor]:
    """Where in a block each of some classes lies, and whether it does, both in their shape."""
    found = classes - begin
    return found.clamp(0, columns - 1), (found >= 0) & (found < columns)
