"""Codes by kernels, in Triton's interpreter: the same as by torch's operations, to the last bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.codes import SPECIAL, are_alike, by_torch, numbers
from tests.deep import DEEP
from zgraph.bridge import codecs, compiled_codecs
from zgraph.bridge.codecs import add_decoded, encode_into
from zgraph.codegen import codes
from zgraph.codegen.fallback import failures_raised
from zgraph.ir import DType
from zgraph.ir.codecs import Codec, parse_codec

TEXTS = [
    "q8(block=256)",
    "q8(block=8)",
    "q4(block=128)",
    "q4(block=16)",
    "q2(block=128)",
    "q2(block=8)",
    "sign(block=256)",
    "sign(block=8)",
]


def by_kernels(codec: Codec, x: torch.Tensor, rest: torch.Tensor | None) -> list[torch.Tensor]:
    code = torch.zeros(len(x), codec.num_bytes(x.shape[1], DType.f32) + 3, dtype=torch.uint8)[:, :-3]
    left = None if rest is None else rest.clone()
    total = torch.ones(x.shape)
    with failures_raised():
        assert codes.encode_rows(codec, x, code, left)
        assert codes.add_rows(codec, code, total)
    return [code, total] if left is None else [code, total, left]


@given(
    st.sampled_from(TEXTS),
    st.sampled_from([1, 7, 8, 9, 255, 257, 700]),
    st.integers(0, 2**20),
    st.lists(st.sampled_from(SPECIAL), max_size=4),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@settings(max_examples=300 if DEEP else 15, deadline=None)
def test_kernels_make_the_codes_of_torch(
    text: str, numel: int, seed: int, special: list[float], has_rest: bool, dtype: torch.dtype
) -> None:
    codec, (x, rest) = parse_codec(text), numbers(numel, seed, special, has_rest=has_rest)
    assert are_alike(by_kernels(codec, x.to(dtype), rest), by_torch(codec, x.to(dtype), rest))


@pytest.mark.parametrize("text", ["topk(1%, chunk=4096)", "q8(block=24)", "q8(block=16384)", "raw"])
def test_what_has_no_kernel_is_left_alone(text: str) -> None:
    codec, x = parse_codec(text), torch.randn(1, 40)
    code = torch.full((1, codec.num_bytes(40, DType.f32)), 7, dtype=torch.uint8)
    assert not codes.encode_rows(codec, x, code, None)
    assert (code == 7).all()


def test_a_device_with_kernels_codes_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert codecs.KERNELS["cuda"] == (codes.encode_rows, codes.add_rows)
    monkeypatch.setitem(codecs.KERNELS, "cpu", codecs.KERNELS["cuda"])
    monkeypatch.setattr(compiled_codecs, "loaded", lambda: pytest.fail("C++ was asked"))
    codec, x = parse_codec("q8(block=8)"), torch.randn(2, 20)
    rest = torch.zeros(2, 20)
    code = encode_into(codec, x, torch.empty(2, codec.num_bytes(20, DType.f32), dtype=torch.uint8), rest)
    assert torch.equal(add_decoded(codec, code, rest.clone()), x)
