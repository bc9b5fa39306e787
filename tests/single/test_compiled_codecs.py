"""Codecs in C++ beside torch's operations: the same codes, numbers and rests, to the last bit."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.codes import SPECIAL, are_alike, by_torch, coded, numbers
from tests.deep import DEEP
from zgraph.bridge import compiled_codecs
from zgraph.bridge.codecs import add_decoded, add_difference, decode, encode, encode_difference, sum_decoded
from zgraph.ir import DType
from zgraph.ir.codecs import TopK, parse_codec

TEXTS = [
    "q8(block=256)",
    "q8(block=8)",
    "q4(block=128)",
    "q4(block=24)",
    "q2(block=128)",
    "q2(block=24)",
    "sign(block=256)",
    "sign(block=40)",
    "topk(1%, chunk=4096)",
    "topk(30%, chunk=9)",
]


@pytest.fixture(autouse=True, scope="module")
def library() -> None:
    compiled_codecs.loaded.cache_clear()
    if compiled_codecs.loaded() is None:
        pytest.skip("there is no compiler of C++")


@given(
    st.sampled_from(TEXTS),
    st.sampled_from([1, 7, 8, 9, 127, 129, 255, 257, 4095, 4097, 9000]),
    st.integers(0, 2**20),
    st.lists(st.sampled_from(SPECIAL), max_size=4),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=2000 if DEEP else 150, deadline=None)
def test_codes_are_those_of_torch(
    text: str, numel: int, seed: int, special: list[float], has_rest: bool, dtype: torch.dtype
) -> None:
    codec = parse_codec(text)
    if isinstance(codec, TopK):  # which of equal magnitudes are kept is left open
        special, dtype = special[:1], torch.float32
    x, rest = numbers(numel, seed, special, has_rest=has_rest)
    assert are_alike(coded(codec, x.to(dtype), rest), by_torch(codec, x.to(dtype), rest))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("numel", [1, 130, 9001])
def test_sums_are_those_of_torch(text: str, numel: int) -> None:
    codec = parse_codec(text)
    x, _ = numbers(numel, numel, SPECIAL[:1], has_rest=False)
    codes, out = encode(codec, torch.cat([x, -x[:1] / 3])), torch.full((numel,), 5.0)
    sum_decoded(codec, codes, out, 3)
    expected = torch.zeros(1, numel)
    for row in codes:
        add_decoded(codec, row[None], expected)
    assert torch.equal(out, expected[0] / 3)
    assert torch.equal(decode(codec, codes, numel)[2], add_decoded(codec, codes[2:], torch.zeros(1, numel))[0])


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_differences_are_those_of_torch(text: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, before = parse_codec(text), torch.randn(9001)
    now, before = (before * (1 + torch.linspace(0, 1e-2, 9001))).to(dtype), before.to(dtype)
    monkeypatch.setattr(compiled_codecs, "SHARED_NUMEL", 1 << 11)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)

    def change() -> tuple[list[torch.Tensor], tuple[float, float]]:
        code = torch.empty(codec.num_bytes(9001, DType.f32), dtype=torch.uint8)
        kept, out = torch.empty_like(now), torch.empty_like(now)
        norms = encode_difference(codec, now, before, kept, code)
        add_difference(codec, code, before, out)
        assert torch.equal(kept, now)
        return [code, out], norms

    found, norms = change()
    monkeypatch.setattr(compiled_codecs, "loaded", lambda: None)
    by_operations, expected = change()
    if not isinstance(codec, TopK):  # which of equal magnitudes are kept is left open
        assert are_alike(found, by_operations)
    assert norms == pytest.approx(expected, rel=1e-12)
    of_change = (now.double() - before.double()).norm()
    assert norms == pytest.approx((float(of_change), float(now.double().norm())), rel=1e-6)


def test_a_number_that_is_not_finite_is_in_the_norms() -> None:
    codec, now = parse_codec("q4"), torch.randn(300)
    now[7] = torch.inf
    code = torch.empty(codec.num_bytes(300, DType.f32), dtype=torch.uint8)
    of_change, of_numbers = encode_difference(codec, now, torch.randn(300), torch.empty(300), code)
    assert not of_change < of_numbers


@pytest.mark.parametrize("text", TEXTS)
def test_threads_share_a_long_row(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, x, rest = parse_codec(text), torch.randn(1, 50_003), torch.randn(1, 50_003)
    alone = coded(codec, x, rest)
    monkeypatch.setattr(compiled_codecs, "SHARED_NUMEL", 1 << 10)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    shared = coded(codec, x, rest)
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


def test_equal_magnitudes_are_kept_from_the_first_on() -> None:
    codec, x = parse_codec("topk(25%, chunk=8)"), torch.tensor([[1.0, -1, 1, 2, 1, 0, 0, 0]])
    _, total = coded(codec, x, None)
    assert (total - 1).tolist() == [[1, 0, 0, 2, 0, 0, 0, 0]]


def test_what_cplusplus_does_not_know_is_coded_by_torch() -> None:
    codec, x = parse_codec("q8(block=8)"), torch.randn(2, 20, dtype=torch.float64)
    assert are_alike(coded(codec, x, None), by_torch(codec, x, None))
    across = torch.randn(20, 2).t()
    assert are_alike(coded(codec, across, None), by_torch(codec, across, None))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of one's own, and no library loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled_codecs.loaded.cache_clear()
    yield tmp_path
    compiled_codecs.loaded.cache_clear()


def test_a_library_is_compiled_once_and_a_damaged_one_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiled_codecs.loaded() is not None
    (kept,) = (cache / "zgraph" / "codecs").glob("*.so")
    whole = kept.read_bytes()
    runs, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **options: runs.append(command) or run(command, **options))

    def again() -> int:
        runs.clear()
        compiled_codecs.loaded.cache_clear()
        assert compiled_codecs.loaded() is not None
        return sum("-shared" in command for command in runs)

    assert again() == 0
    kept.write_bytes(whole[:-1])
    assert again() == 1
    assert again() == 0


@pytest.mark.parametrize("compiler", ["there-is-none", "false"])
def test_without_a_compiler_torch_codes(cache: Path, compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", compiler)
    codec, x = parse_codec("q4(block=8)"), torch.randn(1, 20)
    if compiler == "false":
        with pytest.warns(UserWarning, match="codecs run by torch's operations"):
            assert compiled_codecs.loaded() is None
    else:
        assert compiled_codecs.loaded() is None
    assert are_alike(coded(codec, x, None), by_torch(codec, x, None))
