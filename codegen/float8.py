"""Float8 matmuls with dynamic scales: a cast to float8 with its scale, and the product of two such matrices.

The numbers are those of torchao's `Float8Linear` (`torchao/float8`, recipes `tensorwise` and `rowwise`): a scale is the
dtype's largest number over the largest magnitude, in fp64 and then fp32; by rows it is rounded down to a power of two.
What is cast is multiplied in fp32 and saturates (`zgraph.bridge.float8`).

GPUs need compute capability 8.9 for it. On processors the product is emulated: both matrices are cast to fp32, which
holds their products exactly, and multiplied there. torch's own product of float8 takes seconds there for 512 columns.
"""

from __future__ import annotations

from functools import cache

import torch

from zgraph.bridge.float8 import PIECE, cast, scale_of

Tensor = torch.Tensor

OLDEST_GPU = (8, 9)
"""The compute capability from which NVIDIA's GPUs multiply float8."""


def to_float8(x: Tensor, dtype: torch.dtype, dim: int | None) -> tuple[Tensor, Tensor]:
    """A matrix in float8, and the scales that it was multiplied with, in fp32.

    Args:
        x: [rows, columns], a floating-point matrix.
        dtype: float8_e4m3fn or float8_e5m2.
        dim: 1 for a scale a row, [rows, 1]; 0 for one a column, [1, columns]; None for one in all, [].
    """
    scale = _scale(_largest(x, dim), dtype, dim)
    return cast(x, scale, dtype), scale


def to_float8_in_pieces(x: Tensor, dtype: torch.dtype, dim: int | None) -> tuple[Tensor, Tensor]:
    """`to_float8`, some rows at a time: the same numbers, without copies of the whole."""
    x = x.contiguous()
    rows = max(1, PIECE // max(x.shape[1], 1))
    pieces = torch.split(x, rows)
    largest = [_largest(piece, dim) for piece in pieces]
    amax = torch.cat(largest) if dim == 1 else torch.stack(largest).amax(0)
    scale = _scale(amax, dtype, dim)
    scales = torch.split(scale, rows) if dim == 1 else [scale] * len(pieces)
    made = torch.empty_like(x, dtype=dtype)
    for piece, own, out in zip(pieces, scales, torch.split(made, rows), strict=True):
        out.copy_(cast(piece, own, dtype))
    return made, scale


def _largest(x: Tensor, dim: int | None) -> Tensor:
    return x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)


def _scale(amax: Tensor, dtype: torch.dtype, dim: int | None) -> Tensor:
    scale = scale_of(amax, dtype)
    return scale if dim is None else scale.log2().floor().exp2()


def float8_mm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    """The product of two matrices in float8, divided by their scales: [M, K] by [K, N] to [M, N].

    By rows, what is wanted in fp32 or fp16 is made in bf16 first: kernels have no other.

    Args:
        a: row-major. Its scales are [] or [M, 1].
        b: column-major. Its scales are [] or [1, N].
        dtype: of the result.
        fast: whether GPUs may add up in fewer bits.
    """
    made = torch.bfloat16 if a_scale.dim() else dtype
    if a.device.type == "cpu":
        return (a.float() @ b.float() * (a_scale.reciprocal() * b_scale.reciprocal())).to(made).to(dtype)
    out = torch._scaled_mm(a, b, a_scale.reciprocal(), b_scale.reciprocal(), out_dtype=made, use_fast_accum=fast)
    return out.to(dtype)


def mm_scratch_bytes(a: int, b: int, out: int) -> int:
    """Bytes that a product takes beside operands and result on processors, by how many numbers each has."""
    return 4 * (a + b + 2 * out)


def cast_scratch_bytes(numel: int) -> int:
    """Bytes that a cast takes while it runs: fp32 copies of a piece, before and after they saturate."""
    return 9 * min(numel, PIECE)


def fake_to_float8(x: Tensor, dtype: torch.dtype, dim: int | None) -> tuple[Tensor, Tensor]:
    shape = [] if dim is None else [x.shape[0], 1] if dim == 1 else [1, x.shape[1]]
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(shape, dtype=torch.float32)


def fake_float8_mm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]), dtype=dtype)


@cache
def float8_problem(device: torch.device) -> str:
    """Why a device cannot multiply float8; empty if it can."""
    if device.type == "cpu":
        return ""
    if torch.version.hip is None:
        found = torch.cuda.get_device_capability(device)
        if found < OLDEST_GPU:
            return f"the GPU has compute capability {found[0]}.{found[1]}, and float8 needs 8.9"
    one, x = torch.ones((), device=device), torch.ones(16, 16, device=device)
    try:
        for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            float8_mm(x.to(dtype), one, x.to(torch.float8_e4m3fn).t(), one, torch.bfloat16, fast=True)
    except (RuntimeError, NotImplementedError) as error:
        return f"torch {torch.__version__} has no such matmul there ({str(error).splitlines()[0]})"
    return ""
