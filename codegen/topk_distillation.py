"""The losses of a student that learns from what was kept of a teacher: the most likely words of each token.

The projection is part of it, and the student's logits are never whole, as in `zgraph.codegen.distillation`. With p the
student's probabilities at the temperature and q those of the K words that were kept, the divergence of a token is

    sum q log(q / p)                                                 Hinton et al., 2015

over these words; its gradient by the student's logits at the temperature is p sum(q) - q.

`zgraph::linear_topk_distillation` is an op with a backward of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from zgraph.codegen.distillation import Normaliser, backward_fake, block_columns
from zgraph.codegen.loss import at, computed_in, places
from zgraph.cost.device_workspace import REGISTERED as ON_DEVICE
from zgraph.cost.workspace import REGISTERED
from zgraph.ir import Node
from zgraph.ir.symbols import evaluate

_ALIVE = 5
"""Blocks alive at a time, in fp32."""

Tensor = torch.Tensor


def linear_topk_distillation(
    x: Tensor, weight: Tensor, target: Tensor, words: Tensor, log_q: Tensor, temperature: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The cross-entropy of the student with the targets, and its divergence from the words that were kept.

    Args:
        x, weight: the student's, [T, D] and [V, D].
        target: [T], classes below V, or `ignore_index`.
        words: [T, K], int64, classes below V, of a token each once.
        log_q: [T, K], fp32 or fp64: the logarithms of their probabilities by the teacher, at the temperature.
        temperature: the student's logits are divided by it for the divergence, not for the cross-entropy.
        ignore_index: a target whose token counts for nothing.

    Returns:
        The means of both over the tokens that count (0 where none does, NaN where a label or a word of one is no
        class), and their number, at least 1, []; and two numbers of each token, [2, T]: the logarithms of the sums of
        exponentials of its logits, and of these at the temperature. In fp32, or in fp64 if `x` is.
    """
    made = computed_in(x.dtype)
    plain, own = Normaliser(target, made), Normaliser(target, made)
    picked = torch.full(target.shape, math.nan, dtype=made, device=x.device)  # of a label that is no class
    kept = torch.full(words.shape, math.nan, dtype=made, device=x.device)
    for begin, logits in _blocks(x, weight, made):
        columns, inside = at(target, begin, logits.shape[1])
        picked = torch.where(inside, logits.gather(1, columns)[:, 0], picked)
        columns, inside = places(words, begin, logits.shape[1])
        kept = torch.where(inside, logits.gather(1, columns), kept)
        plain.add(logits)
        own.add(logits.div_(temperature))
    lses = torch.stack([plain.lse(), own.lse()])
    log_p = kept.div_(temperature).sub_(lses[1, :, None])
    log_q = log_q.to(made)
    value = torch.where(log_q > -math.inf, log_q.exp() * (log_q - log_p), 0 * log_p).sum(1)
    counts = target != ignore_index
    number = counts.sum().clamp_min(1).to(made)
    hard = torch.where(counts, lses[0] - picked, 0.0).sum() / number
    soft = torch.where(counts, value, 0.0).sum() / number
    return hard, soft, number, lses


def linear_topk_distillation_backward(
    hard_tangent: Tensor,
    soft_tangent: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    words: Tensor,
    log_q: Tensor,
    number: Tensor,
    lses: Tensor,
    temperature: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """The gradients of `x` and `weight`, from what `linear_topk_distillation` was given and returned, and the gradients
    of its two means, [].
    """
    made = lses.dtype
    counts = (target != ignore_index)[:, None]
    hard = torch.where(counts, hard_tangent.to(made) / number, 0.0)
    soft = torch.where(counts, soft_tangent.to(made) / number / temperature, 0.0)
    q = log_q.to(made).exp()
    total = q.sum(1, keepdim=True)
    dx, dweight = torch.zeros_like(x, dtype=made), torch.empty_like(weight)
    for begin, logits in _blocks(x, weight, made):
        columns, inside = at(target, begin, logits.shape[1])
        gradient = (logits - lses[0, :, None]).exp_()
        gradient.scatter_add_(1, columns, -inside[:, None].to(made)).mul_(hard)
        p = logits.div_(temperature).sub_(lses[1, :, None]).exp_().mul_(total)
        columns, within = places(words, begin, logits.shape[1])
        p.scatter_add_(1, columns, torch.where(within, -q, 0.0))
        part = gradient.addcmul_(p, soft.expand_as(p)).to(x.dtype)
        some = slice(begin, begin + part.shape[1])
        torch.mm(part.t(), x, out=dweight[some])
        dx += part @ weight[some]
    return dx.to(x.dtype), dweight


def scratch_bytes(num_tokens: int, num_classes: int, width: int, num_words: int, itemsize: int) -> int:
    """About the most bytes that either op has alive at once, beside what it reads and what it writes."""
    numel, computed = num_tokens * block_columns(num_tokens, num_classes), max(itemsize, 4)
    return numel * (computed * _ALIVE + itemsize) + num_tokens * computed * (width + 6 * num_words)


def _blocks(x: Tensor, weight: Tensor, made: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Blocks of logits in the dtype of the loss, free to be written to, with the number of their first class."""
    columns = block_columns(len(x), len(weight))
    for begin in range(0, len(weight), columns):
        yield begin, (x @ weight[begin : begin + columns].t()).to(made)


# --- the op ----------------------------------------------------------------------------------------------------------


def _fake(x: Tensor, weight: Tensor, target: Tensor, *_: object) -> Any:
    lses = x.new_empty((2, *target.shape), dtype=computed_in(x.dtype))
    return lses.new_empty(()), lses.new_empty(()), lses.new_empty(()), lses


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *read, ctx.temperature, ctx.ignore_index = inputs
    ctx.save_for_backward(*read, output[2], output[3])
    ctx.mark_non_differentiable(output[2], output[3])


def _differentiate(ctx: Any, hard: Tensor, soft: Tensor, *_: object) -> tuple[Tensor | None, ...]:
    options = (ctx.temperature, ctx.ignore_index)
    made = torch.ops.zgraph.linear_topk_distillation_backward(hard, soft, *ctx.saved_tensors, *options)
    return *made, *(None,) * 5


def _scratch(node: Node, hints: Mapping[str, int]) -> int:
    x, weight, words, *_ = [v.tensor for v in node.operands if len(v.tensor.shape) == 2]
    sizes = (evaluate(d, hints) for d in (*x.shape, weight.shape[0], words.shape[1]))
    num_tokens, width, num_classes, num_words = sizes
    return scratch_bytes(num_tokens, num_classes, width, num_words, x.dtype.itemsize)


_LIBRARY: Any = torch.library.Library("zgraph", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "linear_topk_distillation(Tensor x, Tensor weight, Tensor target, Tensor words, Tensor log_q, float temperature, "
    "int ignore_index) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "linear_topk_distillation_backward(Tensor hard_tangent, Tensor soft_tangent, Tensor x, Tensor weight, "
    "Tensor target, Tensor words, Tensor log_q, Tensor number, Tensor lses, float temperature, int ignore_index) "
    "-> (Tensor, Tensor)"
)
_LIBRARY.impl("linear_topk_distillation", linear_topk_distillation, "CompositeExplicitAutograd")
_LIBRARY.impl("linear_topk_distillation_backward", linear_topk_distillation_backward, "CompositeExplicitAutograd")
torch.library.register_fake("zgraph::linear_topk_distillation", _fake, lib=_LIBRARY)
torch.library.register_fake("zgraph::linear_topk_distillation_backward", backward_fake, lib=_LIBRARY)
torch.library.register_autograd("zgraph::linear_topk_distillation", _differentiate, setup_context=_keep, lib=_LIBRARY)
for _name in ("zgraph.linear_topk_distillation", "zgraph.linear_topk_distillation_backward"):
    REGISTERED[_name] = ON_DEVICE[_name] = _scratch
