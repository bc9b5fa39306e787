"""The cross-entropy of a projection, block by block, against torch's on whole logits in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from zgraph.codegen import library, loss

IGNORED = -100


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(
    num_tokens=st.integers(1, 40),
    num_classes=st.integers(1, 700),
    width=st.integers(1, 20),
    mean=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_the_loss_and_its_gradients_are_torchs(dtype, num_tokens, num_classes, width, mean, seed):
    dice = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, width, generator=dice).to(dtype)
    weight = torch.randn(num_classes, width, generator=dice).to(dtype)
    target = torch.randint(num_classes, (num_tokens,), generator=dice)
    target[torch.rand(num_tokens, generator=dice) < 0.2] = IGNORED
    target[0] = num_classes - 1
    exact_x, exact_weight = (t.double().requires_grad_() for t in (x, weight))
    logits = exact_x @ exact_weight.t()
    logits = logits + ((x @ weight.t()).double() - logits).detach()  # a matmul's results are rounded to its dtype
    exact = F.cross_entropy(logits, target, ignore_index=IGNORED, reduction="mean" if mean else "sum")
    (1.5 * exact).backward()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loss, "BLOCK_BYTES", 4 * num_tokens * loss.MULTIPLE)
        made, number, lse = torch.ops.zgraph.linear_cross_entropy(x, weight, target, IGNORED, mean)
        dx, dweight = torch.ops.zgraph.linear_cross_entropy_backward(
            torch.tensor(1.5), x, weight, target, number, lse, IGNORED, mean
        )
    limit = 1e-5 if dtype is torch.float32 else 1e-2
    floor = limit / 5  # gradients of one class are nothing, and of few a difference of rounded numbers
    assert abs(made.item() - exact.item()) <= limit * abs(exact.item()) + floor
    assert int(number) == int((target != IGNORED).sum())
    assert (dx.dtype, dweight.dtype) == (dtype, dtype)
    for got, wanted in ((dx, exact_x.grad), (dweight, exact_weight.grad)):
        assert float((got.double() - wanted).norm()) <= limit * float(wanted.norm()) + floor * num_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(num_tokens=st.integers(1, 40), num_classes=st.integers(1, 90), mean=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_loss_of_logits_and_its_gradient_are_torchs(dtype, num_tokens, num_classes, mean, seed):
    dice = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(1, num_tokens, num_classes, generator=dice)).to(dtype)
    target = torch.randint(num_classes, (num_tokens,), generator=dice)
    target[1:][torch.rand(num_tokens - 1, generator=dice) < 0.2] = IGNORED
    exact_logits = logits[0].double().requires_grad_()
    exact = F.cross_entropy(exact_logits, target, ignore_index=IGNORED, reduction="mean" if mean else "sum")
    (1.5 * exact).backward()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loss, "BLOCK_BYTES", 4 * 7 * num_classes)
        made, number, lse = torch.ops.zgraph.cross_entropy(logits, target, IGNORED, mean)
        gradient = torch.ops.zgraph.cross_entropy_backward(
            torch.tensor(1.5), logits, target, number, lse, IGNORED, mean
        )
    limit = 1e-5 if dtype is torch.float32 else 1e-2
    assert made.item() == pytest.approx(exact.item(), rel=1e-5, abs=1e-6)
    assert (gradient.dtype, gradient.shape) == (dtype, logits.shape)
    assert float((gradient[0].double() - exact_logits.grad).norm()) <= limit * float(exact_logits.grad.norm()) + 1e-6


def test_nothing_counts():
    """As torch says it: a mean over nothing is not a number, a sum nothing."""
    x, weight, target = torch.randn(3, 4), torch.randn(5, 4), torch.full((3,), IGNORED)
    assert loss.linear_cross_entropy(x, weight, target, IGNORED, True)[0].isnan()
    assert loss.linear_cross_entropy(x, weight, target, IGNORED, False)[0] == 0


def test_what_traces_torch_sees_through_the_ops():
    with torch.device("meta"):
        x, weight, target = torch.empty(6, 4), torch.empty(9, 4), torch.empty(6, dtype=torch.int64)
        made, number, lse = torch.ops.zgraph.linear_cross_entropy(x, weight, target, IGNORED, True)
        assert (made.shape, number.shape, lse.shape) == ((), (), (6,))
    assert library.REGISTERED


def test_blocks_are_whole_tiles():
    assert loss.block_columns(8192, 128_256) == 2048
    assert loss.block_columns(10**9, 128_256) == loss.MULTIPLE
    assert loss.block_columns(8, 300) == 300
