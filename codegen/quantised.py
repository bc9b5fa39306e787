"""Matrices of integers with scales: rows of int8, rows of int4 in groups, and their products with rows of activations.

A row of int8 has one scale, its largest magnitude over 127. Activations are taken as one row of int8, or as three: each
holds what the ones before it leave, 254 times as fine, which keeps 21 bits of them. The products are then exact in
int32, and are added in fp32. A row of int4 has a scale and a smallest number for each group of columns, in bf16, and is
multiplied with activations in bf16.

Both run on kernels of torch for processors (`aten._int_mm`, `aten._weight_int4pack_mm_for_cpu`). On other devices the
matrices are multiplied in fp32.
"""

from __future__ import annotations

import torch

from zgraph.bridge.aten import resolve

Tensor = torch.Tensor

LARGEST = 127
FINER = 2 * LARGEST
"""How much finer each further row of integers is."""

EPS = 1e-12
"""The smallest magnitude that a scale is made for."""

GROUPS = (32, 64, 128)
"""Columns that share a scale, of int4."""

INT4_ROWS = 16
"""Rows of a matrix of int4 are a multiple of this."""

SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Parts of a group's range that are tried for its scale. The one with the least squared error is taken."""

ROWS = 4096
"""Rows of a weight that are quantised at a time, so that copies of it take little memory."""


def to_int8(x: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Rows as int8, and their scales.

    Args:
        x: [rows, columns], floating-point.
        parts: rows of integers for each row: `x = scale * (part 0 + part 1 / 254 + part 2 / 254**2)`.

    Returns:
        int8 [parts * rows, columns], all rows of a part together; fp32 [rows, 1].
    """
    if len(x) > ROWS and parts == 1:
        made = [to_int8(piece, 1) for piece in torch.split(x, ROWS)]
        return torch.cat([data for data, _ in made]), torch.cat([scale for _, scale in made])
    wide = x.float()
    scale = wide.abs().amax(1, keepdim=True).clamp_min(EPS) / LARGEST
    rest = wide / scale
    found = [rest.round()]
    for _ in range(parts - 1):
        rest = (rest - found[-1]) * FINER
        found.append(rest.round())
    return (torch.cat(found) if parts > 1 else found[0]).to(torch.int8), scale


def int8_mm(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The product of rows with the rows of a weight, [rows, outputs].

    Args:
        x: int8 [parts * rows, columns], as `to_int8` gives.
        w: int8 [outputs, columns].
        x_scale: fp32 [rows, 1].
        w_scale: fp32 [outputs, 1].
        dtype: of the result.
    """
    has_kernel = x.device.type == "cpu" and x.shape[1] > 1  # torch's gives anything for one column (2.13)
    exact = resolve("aten._int_mm.default")(x, w.t()) if has_kernel else x.float() @ w.float().t()
    rows = x_scale.shape[0]
    total = exact[:rows].float()
    for part in range(1, exact.shape[0] // max(rows, 1)):
        total.add_(exact[part * rows : (part + 1) * rows], alpha=FINER**-part)
    return total.mul_(x_scale).mul_(w_scale.t()).to(dtype)


def int8_linear(x: Tensor, w: Tensor, scale: Tensor, parts: int, dtype: torch.dtype) -> Tensor:
    """The product of rows with the rows of a weight in int8, [rows, outputs]: `to_int8` and `int8_mm` in one.

    Args:
        x: [rows, columns], floating-point.
        w: int8 [outputs, columns].
        scale: fp32 [outputs, 1].
        parts: rows of int8 for each row of `x`.
        dtype: of the result.
    """
    data, x_scale = to_int8(x, parts)
    return int8_mm(data, w, x_scale, scale, dtype)


def int8_embedding(w: Tensor, index: Tensor, scale: Tensor) -> Tensor:
    """Rows of a table in int8 by index, fp32 [..., columns].

    Args:
        w: int8 [rows, columns].
        index: [...].
        scale: fp32 [rows, 1].
    """
    return torch.embedding(w, index).float() * torch.embedding(scale, index)


def to_int4(w: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """A weight as int4: rounded to the nearest, in the range of each group that errs least of a few.

    Args:
        w: [outputs, columns]; outputs divide by 16, columns by `group`.
        group: columns that share a scale.

    Returns:
        uint8 [outputs, columns / 2], packed as the kernel wants it; bf16 [columns / group, outputs, 2], the scale and
        the number that 8 stands for.
    """
    integers, scales = nearest(w, group)
    return pack_int4(in_pairs(integers)), scales


def in_pairs(integers: Tensor) -> Tensor:
    """Integers from 0 to 15, two in a byte: the even column's in its lower four bits, uint8 [outputs, columns / 2]."""
    return (integers[:, ::2] | integers[:, 1::2] << 4).to(torch.uint8)


def pack_int4(pairs: Tensor) -> Tensor:
    """Integers two in a byte as the kernel wants them: in another order on processors."""
    if pairs.device.type != "cpu":
        return pairs.clone()
    integers = torch.stack([pairs & 15, pairs >> 4], 2).view(len(pairs), -1).int()
    return resolve("aten._convert_weight_to_int4pack_for_cpu.default")(integers, 2)  # type: ignore[no-any-return]


def nearest(w: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The integers of `to_int4` before they are packed, int32 [outputs, columns] from 0 to 15, and its scales."""
    pieces = [_nearest(piece.float(), group) for piece in torch.split(w, ROWS)]
    return torch.cat([q for q, _ in pieces]), torch.cat([s for _, s in pieces], 1).contiguous()


def from_int4(packed: Tensor, scales: Tensor, group: int) -> Tensor:
    """A weight in fp32, from integers of which each byte has two, the even column's in its lower four bits."""
    integers = torch.stack([packed & 15, packed >> 4], 2).view(len(packed), -1, group).float() - 8
    scale, middle = (part.t()[..., None].float() for part in scales.unbind(2))
    return (integers * scale + middle).view(len(packed), -1)


def _nearest(w: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Integers from 0 to 15, int32 [rows, columns], and bf16 [groups, rows, 2]."""
    groups = w.view(len(w), -1, group)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    best = torch.full_like(low, torch.inf)
    integers, scales = torch.zeros_like(groups, dtype=torch.int32), torch.zeros_like(low)
    middles = torch.zeros_like(low)
    for shrink in SHRINKS:
        scale = ((high - low) * shrink / 15).clamp_min(EPS).bfloat16().float()
        middle = ((low + high) / 2 + scale / 2).bfloat16().float()
        found = ((groups - middle) / scale + 8).round().clamp(0, 15)
        error = (groups - (found - 8) * scale - middle).square().sum(2, keepdim=True)
        is_better = error < best
        best = torch.where(is_better, error, best)
        integers = torch.where(is_better, found.int(), integers)
        scales, middles = torch.where(is_better, scale, scales), torch.where(is_better, middle, middles)
    both = torch.cat([scales, middles], 2).transpose(0, 1)
    return integers.view_as(w), both.bfloat16()


def int4_mm(x: Tensor, w: Tensor, scales: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """The product of rows with a weight as `to_int4` gives it, [rows, outputs].

    Args:
        x: [rows, columns].
        w, scales: the weight.
        group: columns that share a scale.
        dtype: of the result.
    """
    if x.device.type == "cpu":
        run = resolve("aten._weight_int4pack_mm_for_cpu.default")
        return run(x.bfloat16(), w, group, scales).to(dtype)  # type: ignore[no-any-return]
    return (x.float() @ from_int4(w, scales, group).t()).to(dtype)


def int4_linear(x: Tensor, pairs: Tensor, scales: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """The product of rows with a weight in int4 that is not packed, [rows, outputs]: in fp32 at least.

    Args:
        x: [rows, columns].
        pairs: uint8 [outputs, columns / 2], as `in_pairs` gives.
        scales: bf16 [columns / group, outputs, 2].
        group: columns that share a scale.
        dtype: of the result.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    pieces = zip(torch.split(pairs, ROWS), torch.split(scales, ROWS, 1), strict=True)
    made = [wide @ from_int4(piece, own, group).to(wide.dtype).t() for piece, own in pieces]
    return (made[0] if len(made) == 1 else torch.cat(made, 1)).to(dtype)


def fake_to_int8(x: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """The metadata of what `to_int8` gives."""
    return x.new_empty(parts * x.shape[0], x.shape[1], dtype=torch.int8), x.new_empty(
        x.shape[0], 1, dtype=torch.float32
    )


def fake_int8_mm(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The metadata of what `int8_mm` gives."""
    return x.new_empty(x_scale.shape[0], w.shape[0], dtype=dtype)


def fake_int8_linear(x: Tensor, w: Tensor, scale: Tensor, parts: int, dtype: torch.dtype) -> Tensor:
    """The metadata of what `int8_linear` gives."""
    return x.new_empty(x.shape[0], w.shape[0], dtype=dtype)


def fake_int8_embedding(w: Tensor, index: Tensor, scale: Tensor) -> Tensor:
    """The metadata of what `int8_embedding` gives."""
    return scale.new_empty(*index.shape, w.shape[1])


def fake_int4_linear(x: Tensor, pairs: Tensor, scales: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """The metadata of what `int4_linear` gives."""
    return x.new_empty(x.shape[0], pairs.shape[0], dtype=dtype)


def fake_to_int4(w: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The metadata of what `to_int4` gives."""
    outputs, columns = w.shape
    packed = w.new_empty(outputs, columns // 2, dtype=torch.uint8)
    return packed, w.new_empty(columns // group, outputs, 2, dtype=torch.bfloat16)


def fake_pack_int4(pairs: Tensor) -> Tensor:
    """The metadata of what `pack_int4` gives."""
    return torch.empty_like(pairs)


def fake_int4_mm(x: Tensor, w: Tensor, scales: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """The metadata of what `int4_mm` gives."""
    return x.new_empty(x.shape[0], w.shape[0], dtype=dtype)


def to_int8_scratch_bytes(numel: int, parts: int) -> int:
    """Bytes beside operands and results that `to_int8` takes for so many numbers: fp32 copies."""
    return 4 * numel * (parts + 2)


def int8_mm_scratch_bytes(parts: int, results: int) -> int:
    """Bytes beside operands and results that `int8_mm` takes: products in int32, and sums in fp32."""
    return 4 * results * (parts + 1)


def to_int4_scratch_bytes(numel: int) -> int:
    """Bytes beside operands and results that `to_int4` takes for so many numbers."""
    return 24 * numel


def pack_int4_scratch_bytes(numel: int) -> int:
    """Bytes beside operands and results that `pack_int4` takes for so many bytes: integers in 8 and in 32 bits."""
    return 12 * numel


def int4_mm_scratch_bytes(x: int, results: int) -> int:
    """Bytes beside operands and results that `int4_mm` takes: both in bf16."""
    return 2 * (x + results)
