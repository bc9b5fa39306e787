"""Codecs: their text, the bytes that they take, and error feedback that loses nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.deep import DEEP
from zgraph.bridge.codecs import decode, encode, encode_into
from zgraph.errors import CodecError
from zgraph.ir import DType
from zgraph.ir.codecs import Q8, Codec, Sign, TopK, parse_codec

TEXTS = [
    "q8(block=256)",
    "q8(block=8)",
    "q4(block=128)",
    "q2(block=128)",
    "sign(block=256)",
    "topk(1%, chunk=4096)",
    "raw",
]
FEEDS = [
    "q8(block=256)",
    "q8(block=16)",
    "q4(block=128)",
    "q4(block=8)",
    "q2(block=128)",
    "q2(block=8)",
    "topk(1%, chunk=4096)",
    "topk(25%, chunk=9)",
]
SIZES = st.sampled_from([1, 2, 7, 8, 9, 127, 128, 129, 255, 257, 5000])
EDGES = [0.0, -0.0, 1e-45, -1e-45, 1.1754944e-38, 3e-41, 1.0, -1.0, 3.4e38, -3.4e38]


@pytest.mark.parametrize("text", [*TEXTS, "delta", "exponent"])
def test_a_text_reads_back(text: str) -> None:
    assert str(parse_codec(text)) == text
    assert parse_codec(str(parse_codec(text))) == parse_codec(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("q9", "did you mean|the codecs are"),
        ("q8(blok=3)", "q8 has no option blok; it has block"),
        ("q8(block=7)", "multiple of 8"),
        ("q8(block=8, block=8)", "given twice"),
        ("q8(block=8", "expected"),
        ("q8(block=8) more", "after the end"),
        ("topk(0%)", "above 0%"),
        ("topk(101%)", "at most 100%"),
        ("topk(1%, chunk=100000)", "chunk must be"),
        ("topk(percent=3)", "no option percent"),
        ("raw(block=8)", "it has none"),
        ("", "the name of a codec"),
    ],
)
def test_a_text_that_means_nothing_is_told(text: str, says: str) -> None:
    with pytest.raises(CodecError, match=says):
        parse_codec(text)


@pytest.mark.parametrize("text", [*TEXTS, *FEEDS])
@pytest.mark.parametrize("numel", [0, 1, 8, 300, 4097])
def test_a_code_has_the_bytes_that_the_codec_says(text: str, numel: int) -> None:
    codec, x = parse_codec(text), torch.randn(2, numel)
    code = encode(codec, x)
    assert code.shape == (2, codec.num_bytes(numel, DType.f32))
    assert decode(codec, code, numel).shape == x.shape


def test_bytes_of_a_megabyte() -> None:
    numel = 1 << 20
    taken = {text: parse_codec(text).num_bytes(numel, DType.f32) for text in TEXTS}
    assert taken["q8(block=256)"] == numel + numel // 256
    assert taken["q4(block=128)"] == numel // 2 + numel // 128
    assert taken["sign(block=256)"] == numel // 8 + numel // 256
    assert taken["topk(1%, chunk=4096)"] == 4 * 41 * (numel // 4096)
    assert taken["raw"] == 4 * numel


@st.composite
def numbers(draw: st.DrawFn) -> torch.Tensor:
    """Numbers of very different magnitudes, with some that are special."""
    numel, seed = draw(SIZES), draw(st.integers(0, 2**20))
    drawn = torch.Generator().manual_seed(seed)
    spread = draw(st.sampled_from([0, 1, 20, 100]))
    exponents = torch.randint(-spread, min(spread, 100) + 1, (numel,), generator=drawn)
    x = torch.randn(numel, generator=drawn) * 2.0**exponents
    for _ in range(draw(st.integers(0, 4))):
        x[draw(st.integers(0, numel - 1))] = draw(st.sampled_from(EDGES))
    return x


@pytest.mark.parametrize("text", FEEDS)
@settings(max_examples=400 if DEEP else 12, deadline=None)
@given(data=st.data())
def test_feedback_loses_nothing(text: str, data: st.DataObject) -> None:
    codec, x = parse_codec(text), data.draw(numbers())[None]
    rest = torch.zeros_like(x)
    for _ in range(3):
        y = x + rest
        code = torch.empty(1, codec.num_bytes(x.numel(), DType.f32), dtype=torch.uint8)
        before = rest.clone()
        encode_into(codec, x, code, rest)
        decoded = decode(codec, code, x.numel())
        finite = _finite(codec, y)
        assert torch.equal((decoded + rest)[finite], y[finite])
        assert torch.equal((decoded.double() + rest.double())[finite], y.double()[finite])
        assert torch.equal(rest[~finite], before[~finite])


@settings(max_examples=400 if DEEP else 12, deadline=None)
@given(x=numbers())
def test_signs_lose_half_of_a_last_bit_at_most(x: torch.Tensor) -> None:
    codec, rest = Sign(), torch.zeros(1, len(x))
    code = torch.empty(1, codec.num_bytes(len(x), DType.f32), dtype=torch.uint8)
    encode_into(codec, x[None], code, rest)
    decoded = decode(codec, code, len(x)).double()
    lost = (decoded + rest.double() - x.double()).abs()
    assert (lost <= 2.0**-24 * rest.double().abs() + 2.0**-150)[_finite(codec, x[None])].all()


def _finite(codec: Codec, y: torch.Tensor) -> torch.Tensor:
    """Which numbers lie in a block without one that is not finite."""
    size = codec.chunk if isinstance(codec, TopK) else codec.block  # type: ignore[attr-defined]
    blocks = y[0].split(size)
    return torch.cat([b.isfinite().all().expand(len(b)) for b in blocks])[None]


@pytest.mark.parametrize("text", [*FEEDS, "sign(block=8)"])
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_stays_so_and_spoils_no_rest(text: str, bad: float) -> None:
    codec, x, rest = parse_codec(text), torch.randn(1, 20000), torch.randn(1, 20000)
    x[0, 777], before = bad, rest.clone()
    code = torch.empty(1, codec.num_bytes(20000, DType.f32), dtype=torch.uint8)
    encode_into(codec, x, code, rest)
    assert not decode(codec, code, 20000).isfinite().all()
    assert rest.isfinite().all()
    assert rest[0, 777] == before[0, 777]
    assert not torch.equal(rest[0, 10000:], before[0, 10000:]), "other blocks go on"


@pytest.mark.parametrize("text", [*TEXTS, *FEEDS])
def test_zeros_are_zeros(text: str) -> None:
    codec = parse_codec(text)
    assert not decode(codec, encode(codec, torch.zeros(3, 700)), 700).any()


@pytest.mark.parametrize(
    ("text", "error"),
    [("q8(block=256)", 0.012), ("q4(block=128)", 0.2), ("q2(block=128)", 0.95), ("sign(block=256)", 0.8)],
)
def test_relative_errors_are_as_large_as_bits_make_them(text: str, error: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 1 << 16)
    found = (decode(parse_codec(text), encode(parse_codec(text), x), x.numel()) - x).norm() / x.norm()
    assert error / 4 < found < error


def test_the_largest_are_kept() -> None:
    x = torch.arange(100.0)[None]
    kept = decode(TopK(10, 100), encode(TopK(10, 100), x), 100)
    assert torch.equal(kept[0, 90:], x[0, 90:])
    assert not kept[0, :90].any()


def test_large_tensors_are_coded_in_pieces_as_small_ones_are() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, (1 << 19) + 123)
    for text in (*FEEDS, "sign(block=256)"):
        codec = parse_codec(text)
        part = (1 << 18) // 9 * 9 if "9" in text else 1 << 18
        whole, first = decode(codec, encode(codec, x), x.numel()), x[:, :part]
        assert torch.equal(whole[:, :part], decode(codec, encode(codec, first), part))


def test_raw_is_exact_in_any_dtype() -> None:
    codec = parse_codec("raw")
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = torch.randn(2, 9).to(dtype)
        assert torch.equal(decode(codec, encode(codec, x), 9, dtype), x)


def test_a_step_of_q8_is_a_power_of_two() -> None:
    x = torch.randn(1, 256)
    steps = decode(Q8(), encode(Q8(), x), 256) * 2.0**20
    assert torch.equal(steps, steps.round())
