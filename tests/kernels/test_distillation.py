"""The losses of a student and a teacher, block by block, against whole logits in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.deep import DEEP, deep
from tests.peaks import peak_bytes
from zgraph.codegen import distillation, library  # noqa: F401 - the library registers what the ops need
from zgraph.distillation.model import IGNORED, divergence


def tensors(num_tokens: int, num_classes: int, width: int, seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Hidden states and weights of a student and of a teacher twice as wide, and targets."""
    dice = torch.Generator().manual_seed(seed)
    made = [
        torch.randn(*shape, generator=dice).to(dtype)
        for shape in ((num_tokens, width), (num_classes, width), (num_tokens, 2 * width), (num_classes, 2 * width))
    ]
    target = torch.randint(num_classes, (num_tokens,), generator=dice)
    target[torch.rand(num_tokens, generator=dice) < 0.2] = IGNORED
    target[0] = num_classes - 1
    return *made, target


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", distillation.DIVERGENCES)
@given(
    num_tokens=st.integers(1, 40),
    num_classes=st.integers(2, 700),
    width=st.integers(1, 20),
    temperature=st.floats(0.5, 4),
    beta=st.floats(0.1, 0.9),
    seed=st.integers(0, 99),
)
@settings(max_examples=200 if DEEP else 20, deadline=None)
def test_losses_and_gradients_are_those_of_whole_logits(
    kind, dtype, num_tokens, num_classes, width, temperature, beta, seed
):
    x, weight, teacher_x, teacher_weight, target = tensors(num_tokens, num_classes, width, seed, dtype)
    exact_x, exact_weight = (t.double().requires_grad_() for t in (x, weight))
    logits, taught = exact_x @ exact_weight.t(), teacher_x.double() @ teacher_weight.double().t()
    hard = F.cross_entropy(logits, target, ignore_index=IGNORED)
    soft = divergence(logits, taught, kind, temperature, beta)[target != IGNORED].mean()
    (0.25 * hard + 1.5 * soft).backward()
    x.requires_grad_(), weight.requires_grad_()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(distillation, "BLOCK_BYTES", 4 * num_tokens * distillation.MULTIPLE)
        made = torch.ops.zgraph.linear_distillation(
            x, weight, teacher_x, teacher_weight, target, kind, beta, temperature, IGNORED
        )
        (0.25 * made[0] + 1.5 * made[1]).backward()
    limit = 5e-6 if dtype is torch.float32 else 1e-12
    largest = max(float(each.detach().abs().max()) for each in (logits, taught))
    scale = largest / min(temperature, 1)  # of which rounding is a part; the rest of a gradient may cancel out
    for got, wanted in ((made[0], hard), (made[1], soft)):
        assert abs(got.item() - wanted.item()) <= limit * (abs(wanted.item()) + scale)
    for got, wanted, factor in ((x.grad, exact_x.grad, weight), (weight.grad, exact_weight.grad, x)):
        assert got.dtype is dtype
        size = 1 + float(wanted.norm()) + float(factor.detach().norm())
        assert float((got.double() - wanted).norm()) <= limit / 4 * (1 + scale) * size
    assert int(made[2]) == int((target != IGNORED).sum())


def test_gradients_are_those_of_differences():
    x, weight, teacher_x, teacher_weight, target = tensors(4, 20, 3, 0, torch.float64)
    x.requires_grad_(), weight.requires_grad_()
    for kind in distillation.DIVERGENCES:
        torch.autograd.gradcheck(
            lambda a, b, kind=kind: torch.ops.zgraph.linear_distillation(
                a, b, teacher_x, teacher_weight, target, kind, 0.3, 1.7, IGNORED
            )[:2],
            (x, weight),
        )


def test_words_that_neither_ever_says_count_for_nothing():
    """Their probabilities are 0 in fp32."""
    x, weight, teacher_x, teacher_weight, target = tensors(6, 200, 4, 0, torch.float32)
    weight[:50], teacher_weight[:50] = 0.0, 0.0
    x[:, 0], weight[50:, 0], teacher_x[:, 0], teacher_weight[50:, 0] = 20.0, 20.0, 20.0, 20.0
    x.requires_grad_()
    for kind in distillation.DIVERGENCES:
        made = torch.ops.zgraph.linear_distillation(
            x, weight, teacher_x, teacher_weight, target, kind, 0.5, 1.0, IGNORED
        )
        exact = divergence(x.double() @ weight.double().t(), (teacher_x @ teacher_weight.t()).double(), kind, 1.0, 0.5)
        assert made[1].item() == pytest.approx(exact[target != IGNORED].mean().item(), rel=1e-4)
        (gradient,) = torch.autograd.grad(made[1], x)
        assert gradient.isfinite().all()


def test_a_student_that_is_the_teacher_learns_nothing():
    x, weight, _, _, target = tensors(9, 300, 8, 3, torch.float64)
    for kind in distillation.DIVERGENCES:
        _, soft, _, _ = torch.ops.zgraph.linear_distillation(x, weight, x, weight, target, kind, 0.5, 2.0, IGNORED)
        assert abs(float(soft)) < 1e-14


@pytest.mark.parametrize("shrunk", [8, deep(1)])
def test_of_128k_words_it_takes_a_twentieth_of_the_memory(shrunk, monkeypatch):
    """A batch of 1,024 tokens; by default all sizes are shrunk, the block's as well."""
    monkeypatch.setattr(distillation, "BLOCK_BYTES", distillation.BLOCK_BYTES // shrunk**2)
    sizes = 1024 // shrunk, 128 * 1024 // shrunk
    x, weight, teacher_x, teacher_weight, target = tensors(*sizes, 4, 0, torch.float32)
    x.requires_grad_(), weight.requires_grad_()

    def whole() -> None:
        logits, taught = x @ weight.t(), teacher_x @ teacher_weight.t()
        hard = F.cross_entropy(logits, target, ignore_index=IGNORED)
        soft = divergence(logits, taught, "forward_kl", 2.0, 0.5)[target != IGNORED].mean()
        torch.autograd.grad(hard + soft, (x, weight))

    def in_blocks() -> None:
        made = torch.ops.zgraph.linear_distillation(
            x, weight, teacher_x, teacher_weight, target, "forward_kl", 0.5, 2.0, IGNORED
        )
        torch.autograd.grad(made[0] + made[1], (x, weight))

    blocks = peak_bytes(in_blocks) - weight.nbytes  # of its gradient, which either makes
    assert blocks <= 0.05 * peak_bytes(whole)
    assert blocks <= distillation.scratch_bytes(*sizes, 4, 4) + weight.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(
    num_tokens=st.integers(1, 30),
    num_classes=st.integers(2, 600),
    width=st.integers(1, 20),
    share=st.floats(0, 1),
    temperature=st.floats(0.5, 4),
    seed=st.integers(0, 99),
)
@settings(max_examples=200 if DEEP else 20, deadline=None)
def test_of_kept_words_losses_and_gradients_are_those_of_whole_logits(
    dtype, num_tokens, num_classes, width, share, temperature, seed
):
    x, weight, teacher_x, teacher_weight, target = tensors(num_tokens, num_classes, width, seed, dtype)
    taught, words = (teacher_x.double() @ teacher_weight.double().t()).topk(1 + int(share * (num_classes - 1)))
    log_q = (taught / temperature).log_softmax(-1)
    exact_x, exact_weight = (t.double().requires_grad_() for t in (x, weight))
    logits = exact_x @ exact_weight.t()
    hard = F.cross_entropy(logits, target, ignore_index=IGNORED)
    log_p = (logits / temperature).log_softmax(-1).gather(1, words)
    soft = (log_q.exp() * (log_q - log_p)).sum(1)[target != IGNORED].mean()
    (0.25 * hard + 1.5 * soft).backward()
    x.requires_grad_(), weight.requires_grad_()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(distillation, "BLOCK_BYTES", 4 * num_tokens * distillation.MULTIPLE)
        made = torch.ops.zgraph.linear_topk_distillation(
            x, weight, target, words, log_q.to(dtype), temperature, IGNORED
        )
        (0.25 * made[0] + 1.5 * made[1]).backward()
    limit = 5e-6 if dtype is torch.float32 else 1e-12
    scale = max(float(each.detach().abs().max()) for each in (logits, taught)) / min(temperature, 1)
    for got, wanted in ((made[0], hard), (made[1], soft)):
        assert abs(got.item() - wanted.item()) <= limit * (abs(wanted.item()) + scale)
    for got, wanted, factor in ((x.grad, exact_x.grad, weight), (weight.grad, exact_weight.grad, x)):
        assert got.dtype is dtype
        size = 1 + float(wanted.norm()) + float(factor.detach().norm())
        assert float((got.double() - wanted).norm()) <= limit / 4 * (1 + scale) * size


def test_of_kept_words_gradients_are_those_of_differences_and_what_is_no_word_is_nan():
    x, weight, _, _, target = tensors(4, 20, 3, 0, torch.float64)
    x.requires_grad_(), weight.requires_grad_()
    words = torch.stack([torch.randperm(20)[:5] for _ in range(4)])
    log_q = torch.randn(4, 5, dtype=torch.float64).log_softmax(-1)
    call = torch.ops.zgraph.linear_topk_distillation
    torch.autograd.gradcheck(lambda a, b: call(a, b, target, words, log_q, 1.7, IGNORED)[:2], (x, weight))
    words[0, 0] = 20
    target[0] = 1
    assert call(x, weight, target, words, log_q, 1.7, IGNORED)[1].isnan()
