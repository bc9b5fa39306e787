"""Losses of a student that learns from a teacher, with neither's logits whole in memory: by blocks of the vocabulary.

Both projections are part of it. A first sweep brings the logarithms of sums of exponentials up to date from block to
block (Milakov, Gimelshein: "Online normalizer calculation for softmax", 2018), a second sums the divergence. The
backward makes each block of logits once more, from four numbers a token.

With p the student's probabilities and q the teacher's, both at the temperature, the divergence of a token is

    forward_kl   sum q log(q / p)                                   Hinton et al., 2015
    reverse_kl   sum p log(p / q)                                   Gu et al., "MiniLLM", 2024
    jsd          beta sum q log(q / m) + (1 - beta) sum p log(p / m),  m = beta q + (1 - beta) p
                                                                    Agarwal et al., "On-policy distillation", 2024

The gradient by the student's logits z is p - q for the first, and p (h - sum p h) for the others, with h = log(p / q)
or (1 - beta) log(p / m); by the chain rule it is divided by the temperature.

`zgraph::linear_distillation` is an op with a backward of its own, so that a captured step has it as two nodes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from zgraph.codegen.loss import MULTIPLE, at, computed_in
from zgraph.cost.device_workspace import REGISTERED as ON_DEVICE
from zgraph.cost.workspace import REGISTERED
from zgraph.ir import Node
from zgraph.ir.symbols import evaluate

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
BLOCK_BYTES = 16 << 20
"""A block of logits in fp32."""
_ALIVE = 7
"""Blocks alive at a time, in fp32."""

Tensor = torch.Tensor


def block_columns(num_tokens: int, num_classes: int) -> int:
    """How many classes a block has."""
    columns = BLOCK_BYTES // (4 * max(num_tokens, 1)) // MULTIPLE * MULTIPLE
    return min(max(columns, MULTIPLE), num_classes)


def scratch_bytes(num_tokens: int, num_classes: int, width: int, itemsize: int) -> int:
    """About the most bytes that either op has alive at once, beside what it reads and what it writes."""
    numel = num_tokens * block_columns(num_tokens, num_classes)
    computed = max(itemsize, 4)
    return numel * (computed * _ALIVE + itemsize) + num_tokens * width * computed


def linear_distillation(
    x: Tensor,
    weight: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    target: Tensor,
    divergence: str,
    beta: float,
    temperature: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The cross-entropy of the student with the targets, and its divergence from the teacher.

    Args:
        x, weight: the student's, [T, D] and [V, D].
        teacher_x, teacher_weight: the teacher's, [T, E] and [V, E].
        target: [T], classes below V, or `ignore_index`.
        divergence: one of `DIVERGENCES`.
        beta: the teacher's share of the mixture of "jsd".
        temperature: logits are divided by it for the divergence, not for the cross-entropy.
        ignore_index: a target whose token counts for nothing.

    Returns:
        The means of both over the tokens that count (0 where none does, NaN where one's label is no class), and their
        number, at least 1, []; and four numbers of each token, [4, T]: the logarithms of the sums of exponentials of
        the student's logits, of these at the temperature, of the teacher's at the temperature, and the sum p h above.
        All in fp32, or in fp64 if `x` is.
    """
    made = computed_in(x.dtype)
    plain, own, others = (Normaliser(target, made) for _ in range(3))
    picked = torch.full(target.shape, math.nan, dtype=made, device=x.device)  # of a label that is no class
    for begin, logits, teacher in _blocks(x, weight, teacher_x, teacher_weight, made):
        columns, inside = at(target, begin, logits.shape[1])
        picked = torch.where(inside, logits.gather(1, columns)[:, 0], picked)
        plain.add(logits)
        own.add(logits.div_(temperature))
        others.add(teacher.div_(temperature))
    lses = torch.stack([plain.lse(), own.lse(), others.lse()])
    value, sums = torch.zeros_like(picked), torch.zeros_like(picked)
    for _, logits, teacher in _blocks(x, weight, teacher_x, teacher_weight, made):
        log_p = logits.div_(temperature).sub_(lses[1, :, None])
        log_q = teacher.div_(temperature).sub_(lses[2, :, None])
        if divergence == "forward_kl":
            value += (log_q.exp() * log_q.sub_(log_p)).sum(1)
        elif divergence == "reverse_kl":
            value += (log_p.exp() * log_p.sub_(log_q)).sum(1)
        else:
            log_m = _mixture(log_p, log_q, beta)
            inner = (log_p.exp() * log_p.sub_(log_m)).sum(1)
            sums += inner
            value += beta * (log_q.exp() * log_q.sub_(log_m)).sum(1) + (1 - beta) * inner
    counts = target != ignore_index
    number = counts.sum().clamp_min(1).to(made)
    hard = torch.where(counts, lses[0] - picked, 0.0).sum() / number
    soft = torch.where(counts, value, 0.0).sum() / number
    sums = value if divergence == "reverse_kl" else sums
    return hard, soft, number, torch.cat([lses, sums[None]])


def linear_distillation_backward(
    hard_tangent: Tensor,
    soft_tangent: Tensor,
    x: Tensor,
    weight: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    target: Tensor,
    number: Tensor,
    kept: Tensor,
    divergence: str,
    beta: float,
    temperature: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """The gradients of `x` and `weight`, from what `linear_distillation` was given and returned, and the gradients of
    its two means, [].
    """
    made = kept.dtype
    counts = (target != ignore_index)[:, None]
    hard = torch.where(counts, hard_tangent.to(made) / number, 0.0)
    soft = torch.where(counts, soft_tangent.to(made) / number / temperature, 0.0)
    dx, dweight = torch.zeros_like(x, dtype=made), torch.empty_like(weight)
    for begin, logits, teacher in _blocks(x, weight, teacher_x, teacher_weight, made):
        places, inside = at(target, begin, logits.shape[1])
        gradient = (logits - kept[0, :, None]).exp_()
        gradient.scatter_add_(1, places, -inside[:, None].to(made)).mul_(hard)
        log_p = logits.div_(temperature).sub_(kept[1, :, None])
        log_q = teacher.div_(temperature).sub_(kept[2, :, None])
        p = log_p.exp()
        if divergence == "forward_kl":
            p.sub_(log_q.exp_())
        elif divergence == "reverse_kl":
            p.mul_(log_p.sub_(log_q).sub_(kept[3, :, None]))
        else:
            p.mul_(log_p.sub_(_mixture(log_p, log_q, beta)).sub_(kept[3, :, None])).mul_(1 - beta)
        part = gradient.addcmul_(p, soft.expand_as(p)).to(x.dtype)
        columns = slice(begin, begin + part.shape[1])
        torch.mm(part.t(), x, out=dweight[columns])
        dx += part @ weight[columns]
    return dx.to(x.dtype), dweight


def _mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """The logarithm of beta q + (1 - beta) p, where both are too small for a number as well."""
    return torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))


class Normaliser:
    """The logarithm of the sum of exponentials of each row, over blocks of columns."""

    def __init__(self, target: Tensor, dtype: torch.dtype) -> None:
        self.top = torch.full(target.shape, float("-inf"), dtype=dtype, device=target.device)
        self.total = torch.zeros_like(self.top)

    def add(self, logits: Tensor) -> None:
        higher = torch.maximum(self.top, logits.amax(1))
        self.total.mul_(self.top.sub_(higher).exp_()).add_((logits - higher[:, None]).exp_().sum(1))
        self.top = higher

    def lse(self) -> Tensor:
        return self.top + self.total.log()


def _blocks(
    x: Tensor, weight: Tensor, teacher_x: Tensor, teacher_weight: Tensor, made: torch.dtype
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Blocks of both logits in the dtype of the loss, free to be written to, with the number of their first class."""
    columns = block_columns(len(x), len(weight))
    for begin in range(0, len(weight), columns):
        some = slice(begin, begin + columns)
        yield begin, (x @ weight[some].t()).to(made), (teacher_x @ teacher_weight[some].t()).to(made)


# --- the op ----------------------------------------------------------------------------------------------------------


def _fake(x: Tensor, weight: Tensor, teacher_x: Tensor, teacher_weight: Tensor, target: Tensor, *_: object) -> Any:
    kept = x.new_empty((4, *target.shape), dtype=computed_in(x.dtype))
    return kept.new_empty(()), kept.new_empty(()), kept.new_empty(()), kept


def backward_fake(hard: Tensor, soft: Tensor, x: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """The types of the gradients of a student's two operands."""
    return torch.empty_like(x), torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *read, ctx.divergence, ctx.beta, ctx.temperature, ctx.ignore_index = inputs
    ctx.save_for_backward(*read, output[2], output[3])
    ctx.mark_non_differentiable(output[2], output[3])


def _differentiate(ctx: Any, hard: Tensor, soft: Tensor, *_: object) -> tuple[Tensor | None, ...]:
    options = (ctx.divergence, ctx.beta, ctx.temperature, ctx.ignore_index)
    made = torch.ops.zgraph.linear_distillation_backward(hard, soft, *ctx.saved_tensors, *options)
    return *made, *(None,) * 7


def _scratch(node: Node, hints: Mapping[str, int]) -> int:
    x, weight = [v.tensor for v in node.operands if len(v.tensor.shape) == 2][:2]
    num_tokens, width, num_classes = (evaluate(d, hints) for d in (*x.shape, weight.shape[0]))
    return scratch_bytes(num_tokens, num_classes, width, x.dtype.itemsize)


_LIBRARY: Any = torch.library.Library("zgraph", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "linear_distillation(Tensor x, Tensor weight, Tensor teacher_x, Tensor teacher_weight, Tensor target, "
    "str divergence, float beta, float temperature, int ignore_index) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "linear_distillation_backward(Tensor hard_tangent, Tensor soft_tangent, Tensor x, Tensor weight, Tensor teacher_x, "
    "Tensor teacher_weight, Tensor target, Tensor number, Tensor kept, str divergence, float beta, float temperature, "
    "int ignore_index) -> (Tensor, Tensor)"
)
_LIBRARY.impl("linear_distillation", linear_distillation, "CompositeExplicitAutograd")
_LIBRARY.impl("linear_distillation_backward", linear_distillation_backward, "CompositeExplicitAutograd")
torch.library.register_fake("zgraph::linear_distillation", _fake, lib=_LIBRARY)
torch.library.register_fake("zgraph::linear_distillation_backward", backward_fake, lib=_LIBRARY)
torch.library.register_autograd("zgraph::linear_distillation", _differentiate, setup_context=_keep, lib=_LIBRARY)
REGISTERED["zgraph.linear_distillation"] = REGISTERED["zgraph.linear_distillation_backward"] = _scratch
ON_DEVICE["zgraph.linear_distillation"] = ON_DEVICE["zgraph.linear_distillation_backward"] = _scratch
