"""Integers with scales: how far they are from what they stand for, and products that are those of their numbers."""

import pytest
import torch

from tests.deep import DEEP
from zgraph.codegen import library as _kernels  # noqa: F401 - registers the ops
from zgraph.codegen import quantised

SEEDS = range(20 if DEEP else 3)


def matrix(seed: int, rows: int, columns: int) -> torch.Tensor:
    """Numbers of very different sizes: rows by up to 1,000, and some columns by 100."""
    dice = torch.Generator().manual_seed(seed)
    made = torch.randn(rows, columns, generator=dice) * 10 ** (3 * torch.rand(rows, 1, generator=dice))
    made[:, :: max(columns // 3, 1)] *= 100
    return made


def whole(data: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What rows of int8 stand for, in fp64."""
    parts = data.double().view(-1, *scale.shape[:1], data.shape[1])
    return sum(part / 254.0**n for n, part in enumerate(parts)) * scale.double()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_rows_of_int8_are_as_close_as_their_parts_allow(seed, parts):
    x = matrix(seed, 5, 33)
    data, scale = quantised.to_int8(x, parts)
    assert data.shape == (parts * 5, 33)
    assert data.abs().max() <= 127
    largest = x.double().abs().amax(1, keepdim=True)
    allowed = largest / 254 / 254 ** (parts - 1) + 4e-7 * largest
    assert ((whole(data, scale) - x.double()).abs() <= allowed).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("parts", [1, 3])
def test_products_of_int8_are_those_of_their_numbers(seed, parts):
    (x, xs), (w, ws) = quantised.to_int8(matrix(seed, 3, 64), parts), quantised.to_int8(matrix(seed + 1, 16, 64), 1)
    wanted = whole(x, xs) @ whole(w, ws).t()
    made = torch.ops.zgraph.int8_mm(x, w, xs, ws, torch.float32)
    size = whole(x, xs).abs() @ whole(w, ws).abs().t()
    assert ((made.double() - wanted).abs() <= 1e-6 * size).all()
    assert torch.ops.zgraph.int8_mm(x, w, xs, ws, torch.bfloat16).dtype is torch.bfloat16


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("group", quantised.GROUPS)
def test_int4_is_within_half_a_step_where_nothing_is_cut(seed, group):
    w = matrix(seed, 16, 2 * group)
    integers, scales = quantised.nearest(w, group)
    assert integers.min() >= 0
    assert integers.max() <= 15
    packed = (integers[:, ::2] | integers[:, 1::2] << 4).to(torch.uint8)
    back = quantised.from_int4(packed, scales, group)
    groups = w.view(16, -1, group)
    span = groups.amax(2) - groups.amin(2)
    error = (back - w).view(16, -1, group).norm(dim=2)
    assert (error <= span / 15 * 0.6 * group**0.5).all()
    again, _ = quantised.nearest(back, group)
    assert (quantised.nearest(back, group)[1] - scales).abs().max() <= 0.02 * scales.abs().max()
    assert (again - integers).abs().max() <= 1


@pytest.mark.parametrize("group", quantised.GROUPS)
def test_products_of_int4_are_those_of_their_numbers(group):
    w, x = torch.randn(32, 2 * group), torch.randn(3, 2 * group)
    data, scales = torch.ops.zgraph.to_int4(w, group)
    made = torch.ops.zgraph.int4_mm(x, data, scales, group, torch.float32)
    integers, _ = quantised.nearest(w, group)
    packed = (integers[:, ::2] | integers[:, 1::2] << 4).to(torch.uint8)
    wanted = x.bfloat16().double() @ quantised.from_int4(packed, scales, group).double().t()
    assert (made.double() - wanted).norm() <= 0.01 * wanted.norm()


def test_rows_of_zeros_stay_zeros():
    data, scale = quantised.to_int8(torch.zeros(2, 32), 3)
    assert not data.any()
    assert torch.isfinite(scale).all()
    packed, scales = quantised.to_int4(torch.zeros(16, 32), 32)
    assert quantised.int4_mm(torch.ones(1, 32), packed, scales, 32, torch.float32).abs().max() <= 1e-9


def _pairs(w: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    integers, scales = quantised.nearest(w, group)
    return quantised.in_pairs(integers), scales


@pytest.mark.parametrize("num_rows", [1, 6, 8])
def test_a_weight_of_one_column(num_rows):
    x, w = torch.randn(num_rows, 1), torch.randn(16, 1)
    made = torch.ops.zgraph.int8_linear(x, *quantised.to_int8(w, 1), 3, torch.float32)
    assert torch.allclose(made, x @ w.t(), atol=1e-5)


def test_a_product_with_what_is_not_packed_is_that_with_the_numbers():
    x, w = torch.randn(3, 64), torch.randn(2 * quantised.ROWS, 64)
    pairs, scales = _pairs(w, 32)
    made = torch.ops.zgraph.int4_linear(x, pairs, scales, 32, torch.float32)
    assert torch.allclose(made, x @ quantised.from_int4(pairs, scales, 32).t(), atol=1e-5)


@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("to_int8", (torch.randn(4, 32), 3)),
        ("to_int4", (torch.randn(16, 64), 32)),
        (
            "int8_mm",
            (
                *(quantised.to_int8(torch.randn(n, 32), 1)[0] for n in (3, 8)),
                *[torch.ones(n, 1) for n in (3, 8)],
                torch.bfloat16,
            ),
        ),
        ("pack_int4", (torch.randint(256, (16, 32), dtype=torch.uint8),)),
        (
            "int8_linear",
            (torch.randn(3, 32), *quantised.to_int8(torch.randn(8, 32), 1), 3, torch.bfloat16),
        ),
        (
            "int8_embedding",
            (quantised.to_int8(torch.randn(8, 32), 1)[0], torch.tensor([[1, 7]]), torch.ones(8, 1)),
        ),
        (
            "int4_linear",
            (torch.randn(3, 64), *_pairs(torch.randn(16, 64), 32), 32, torch.bfloat16),
        ),
        ("int4_mm", (torch.randn(3, 64), *quantised.to_int4(torch.randn(16, 64), 32), 32, torch.float32)),
    ],
)
def test_metadata_is_that_of_the_results(op, args):
    made, fake = getattr(quantised, op)(*args), getattr(quantised, f"fake_{op}")(*args)
    for one, other in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (made, fake)), strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
