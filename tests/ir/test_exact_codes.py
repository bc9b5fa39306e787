"""Exact codes: they stand for the numbers to the last bit, are near the entropy, and never longer than the numbers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.deep import DEEP
from zgraph.bridge import exact_codes, sized_codes
from zgraph.bridge.sized_codes import all_same, decode_sized, encode_sized, sized_bytes
from zgraph.errors import PlanMismatchError
from zgraph.ir import DType
from zgraph.ir.codecs import HEAD_BYTES, Delta, Exponent, Sized

CODECS = (Delta(), Exponent())
SIZES = st.sampled_from([0, 1, 2, 7, 8, 9, 100, 257, 3000])


def drawn(kind: str, numel: int, seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers, and the copy before."""
    rng = torch.Generator().manual_seed(seed)
    old = torch.randn(numel, generator=rng).to(dtype)
    moved = {
        "same": old.clone(),
        "near": (old.double() * (1 + 0.004 * torch.randn(numel, generator=rng).double())).to(dtype),
        "crossing": (old.double() - 0.3).to(dtype),
        "zeros": torch.zeros(numel, dtype=dtype),
        "any": torch.randint(-32768, 32768, (numel,), generator=rng).to(torch.int16).view(dtype),
    }
    return moved[kind], old


def again(codec: Sized, new: torch.Tensor, old: torch.Tensor | None) -> tuple[torch.Tensor, int]:
    """Numbers that a code stands for, and its bytes."""
    code = torch.full((codec.num_bytes(new.numel(), DType.bf16) + 5,), 255, dtype=torch.uint8)
    size = encode_sized(codec, new, code, old, 7)
    assert size == sized_bytes(code) <= HEAD_BYTES + new.nbytes
    code[size:] = 170  # what is behind a code is not read
    made = torch.full_like(new, 3.0)
    decode_sized(codec, code, made, old, 7)
    return made, size


@settings(max_examples=300 if DEEP else 40, deadline=None)
@given(
    kind=st.sampled_from(["same", "near", "crossing", "zeros", "any"]),
    numel=SIZES,
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    block=st.sampled_from([64, exact_codes.BLOCK]),
    has_copy=st.booleans(),
)
def test_codes_stand_for_the_numbers_to_the_last_bit(
    kind: str, numel: int, seed: int, dtype: torch.dtype, block: int, has_copy: bool
) -> None:
    usual, exact_codes.BLOCK = exact_codes.BLOCK, block
    try:
        new, old = drawn(kind, numel, seed, dtype)
        for codec in CODECS if dtype is torch.bfloat16 else CODECS[:1]:
            made, _ = again(codec, new, old if has_copy and codec is CODECS[0] else None)
            assert torch.equal(made.view(torch.int16), new.view(torch.int16))
    finally:
        exact_codes.BLOCK = usual


def entropy(symbols: np.ndarray) -> float:
    counts = np.unique(symbols, return_counts=True)[1] / len(symbols)
    return float(-(counts * np.log2(counts)).sum())


@pytest.mark.parametrize("step", [1e-5, 1e-4, 1e-3])
def test_a_step_takes_few_more_bits_than_its_entropy(step: float) -> None:
    rng = torch.Generator().manual_seed(0)
    old = 0.04 * torch.randn(200_000, generator=rng)
    new = (old - step * torch.randn(200_000, generator=rng).clamp(-2, 2)).bfloat16()
    made, size = again(Delta(), new, old := old.bfloat16())
    assert torch.equal(made, new)
    difference = exact_codes._in_order(sized_codes._patterns(new)) - exact_codes._in_order(sized_codes._patterns(old))
    bound = entropy(difference)
    assert bound <= 8 * size / 200_000 < 1.08 * bound


def test_exponents_take_few_more_bits_than_their_entropy() -> None:
    new = (0.04 * torch.randn(200_000, generator=torch.Generator().manual_seed(0))).bfloat16()
    made, size = again(Exponent(), new, None)
    assert torch.equal(made, new)
    bound = 8 + entropy(sized_codes._patterns(new) >> 7 & 255)
    assert bound < 8 * size / 200_000 < 1.02 * bound


def test_nothing_that_changed_takes_a_head_alone_and_what_is_random_no_more_than_itself() -> None:
    new, old = drawn("same", 3000, 0, torch.bfloat16)
    assert again(Delta(), new, old)[1] == HEAD_BYTES
    new, old = drawn("any", 3000, 0, torch.bfloat16)
    assert again(Delta(), new, old)[1] == again(Exponent(), new, None)[1] == HEAD_BYTES + new.nbytes


def test_a_change_of_another_copy_is_told() -> None:
    new, old = drawn("near", 100, 0, torch.bfloat16)
    code = torch.empty(Delta().num_bytes(100, DType.bf16), dtype=torch.uint8)
    encode_sized(Delta(), new, code, old, 7)
    for copy, number in ((old, 8), (None, 7)):
        with pytest.raises(PlanMismatchError, match="changed since copy 7"):
            decode_sized(Delta(), code, torch.empty_like(new), copy, number)
    assert not all_same([code], 7)
    encode_sized(Delta(), old, code, old, 7)
    assert all_same([code, code], 7)
    with pytest.raises(PlanMismatchError, match="this rank has copy 8"):
        all_same([code], 8)
