"""Rounding that makes up for its own errors errs less on its text than rounding to the nearest."""

import pytest
import torch

from tests.deep import DEEP
from zgraph.codegen import quantised
from zgraph.codegen.gptq import _damped, _Fitting, gptq

SEEDS = range(20 if DEEP else 4)


def whole(integers: torch.Tensor, scales: torch.Tensor, group: int) -> torch.Tensor:
    packed = (integers[:, ::2] | integers[:, 1::2] << 4).to(torch.uint8)
    return quantised.from_int4(packed, scales, group)


def inputs(seed: int, num_tokens: int, columns: int) -> torch.Tensor:
    """Tokens whose columns go together, some of them far larger than others."""
    dice = torch.Generator().manual_seed(seed)
    mixed = torch.randn(num_tokens, columns // 4, generator=dice) @ torch.randn(columns // 4, columns, generator=dice)
    noise = torch.randn(num_tokens, columns, generator=dice)
    return (mixed + noise) * 10 ** torch.rand(columns, generator=dice)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("group", [32, 64])
def test_the_error_on_its_text_is_less_than_that_of_the_nearest(seed, group):
    x, w = inputs(seed, 256, 128), torch.randn(16, 128, generator=torch.Generator().manual_seed(seed))
    wanted = x @ w.t()
    integers, scales = gptq(w, x.t() @ x, group)
    assert integers.min() >= 0
    assert integers.max() <= 15
    assert scales.shape == (128 // group, 16, 2)
    found = (x @ whole(integers, scales, group).t() - wanted).norm()
    plain = (x @ whole(*quantised.nearest(w, group), group).t() - wanted).norm()
    assert found < 0.8 * plain


@pytest.mark.parametrize("group", quantised.GROUPS)
def test_columns_that_do_not_go_together_are_rounded_to_the_nearest(group):
    w, weight = torch.randn(16, 2 * group), torch.rand(2 * group) + 0.1
    weight[3] = 0
    integers, scales = gptq(w, torch.diag(weight), group)
    scale, middle = (part.t().float().repeat_interleave(group, 1) for part in scales.unbind(2))
    assert torch.equal(integers, ((w - middle) / scale + 8).round().clamp(0, 15).int())
    own, plain = (
        ((whole(*q, group) - w).square() * weight).sum() for q in ((integers, scales), quantised.nearest(w, group))
    )
    assert own < plain


@pytest.mark.parametrize("seed", SEEDS)
def test_fitting_scales_and_integers_lessens_the_error(seed):
    x, w = inputs(seed, 256, 128), torch.randn(16, 128, generator=torch.Generator().manual_seed(seed))
    fitting = _Fitting(w, _damped(x.t() @ x), 32)
    fitting.round_in_order()

    def error() -> torch.Tensor:
        change = (fitting.numbers() - w).double()
        return ((change @ fitting.moments.double()) * change).sum(1)

    before = first = error()
    for step in (fitting.fit_scales, fitting.fit_integers, fitting.fit_scales, fitting.fit_integers):
        step()
        assert (error() <= before * (1 + 1e-4)).all()
        before = error()
    assert before.sum() < 0.98 * first.sum()


def test_two_columns_are_as_good_as_any_pair_of_their_integers():
    """The second column's integer is the best of all for the first one's."""
    x = torch.randn(64, 32)
    x[:, :30] = 0
    x[:, 31] = 0.9 * x[:, 30] + 0.1 * x[:, 31]
    w = torch.randn(16, 32)
    integers, scales = gptq(w, x.t() @ x, 32)
    best = torch.full((16,), torch.inf)
    for number in range(16):
        other = integers.clone()
        other[:, 31] = number
        best = torch.minimum(best, (x @ (whole(other, scales, 32) - w).t()).norm(dim=0))
    assert ((x @ (whole(integers, scales, 32) - w).t()).norm(dim=0) <= 1.05 * best).all()
