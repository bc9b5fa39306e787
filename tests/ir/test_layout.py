"""How tensors are cut and how their chunks lie in a bucket, against torch.chunk."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from zgraph.errors import VerifyError
from zgraph.ir import DType, TensorType
from zgraph.ir.layout import MEMBER_ALIGN_BYTES, bucket_layout, chunk_numel, chunk_rows, is_even, local_rows
from zgraph.ir.symbols import symbol

ranks = st.integers(1, 9)
shapes = st.lists(st.integers(1, 7), max_size=3).map(tuple)


@given(st.integers(1, 40), ranks)
def test_rows_are_those_of_torch_chunk(rows, num_ranks):
    pieces = torch.arange(rows).chunk(num_ranks)
    wanted = [len(p) for p in pieces] + [0] * (num_ranks - len(pieces))
    assert [local_rows(rows, num_ranks, r) for r in range(num_ranks)] == wanted
    assert chunk_rows(rows, num_ranks) == max(wanted)


@given(shapes, ranks)
def test_chunks_of_all_ranks_cover_the_tensor(shape, num_ranks):
    tensor = torch.arange(math.prod(shape)).view(shape)
    chunk = chunk_numel(shape, num_ranks)
    padded = torch.full((chunk * num_ranks,), -1)
    padded[: tensor.numel()] = tensor.reshape(-1)
    wanted = tensor.chunk(num_ranks) if shape else (tensor,)
    for rank, piece in enumerate(wanted):
        found = padded[rank * chunk : rank * chunk + piece.numel()]
        assert torch.equal(found, piece.reshape(-1))
    assert is_even(shape, num_ranks) == (chunk * num_ranks == tensor.numel())


members = st.lists(shapes, min_size=1, max_size=6)


@given(members, ranks, st.sampled_from([DType.f32, DType.bf16, DType.u8, DType.c128]))
def test_members_of_a_bucket_are_aligned_and_disjoint(shapes, num_ranks, dtype):
    layout = bucket_layout([TensorType(dtype, s) for s in shapes], num_ranks)
    assert layout.chunks == tuple(chunk_numel(s, num_ranks) for s in shapes)
    end = 0
    for offset, chunk in zip(layout.offsets, layout.chunks, strict=True):
        assert offset >= end
        assert offset * dtype.itemsize % MEMBER_ALIGN_BYTES == 0
        assert (offset - end) * dtype.itemsize < MEMBER_ALIGN_BYTES
        end = offset + chunk
    assert layout.part_numel == end


@given(members, ranks)
def test_a_bucket_begins_as_the_bucket_of_its_first_members(shapes, num_ranks):
    assume(len(shapes) > 1)
    kinds = [TensorType(DType.f32, s) for s in shapes]
    assert bucket_layout(kinds, num_ranks).offsets[:-1] == bucket_layout(kinds[:-1], num_ranks).offsets


def test_an_unknown_size_cannot_be_sharded():
    with pytest.raises(VerifyError, match="known sizes, not s0"):
        chunk_numel((symbol("s0"), 2), 2)
    with pytest.raises(VerifyError, match="known sizes"):
        is_even((symbol("s0"),), 2)


@pytest.mark.parametrize(("dtype", "itemsize"), [("f64", 8), ("bf16", 2), ("f8e4m3", 1), ("c128", 16), ("bool", 1)])
def test_item_sizes_are_those_of_the_name(dtype, itemsize):
    assert DType(dtype).itemsize == itemsize
