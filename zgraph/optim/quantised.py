"""Numbers as codes of 8 bits, with a scale for each block (Dettmers et al.: "8-bit optimizers via block-wise
quantization", 2022; the code is their dynamic tree, as bitsandbytes and torchao have it)."""

from __future__ import annotations

from functools import cache

import torch
from torch.nn import functional as F

BLOCK = 256
"""Numbers that share a scale. Blocks end with the row that they are in, so that no rank holds a part of one."""

_DECADES = 7


@cache
def values_of(is_signed: bool, device: torch.device) -> torch.Tensor:
    """The 256 values that codes stand for, fp32, ascending: from -1 or 0 to 1, twice as dense in each decade."""
    found = [0.0, 1.0]
    for decade in range(_DECADES):
        bounds = torch.linspace(0.1, 1, (1 << decade + (not is_signed)) + 1, dtype=torch.float64)
        found += ((bounds[:-1] + bounds[1:]) / 2 * 10.0 ** (decade - _DECADES + 1)).tolist()
    if is_signed:
        found += [-value for value in found[2:]]
    return torch.tensor(sorted(found), dtype=torch.float32, device=device)


@cache
def _bounds(is_signed: bool, device: torch.device) -> torch.Tensor:
    """Between neighbouring values, and behind the last."""
    values = values_of(is_signed, device)
    return torch.cat([(values[:-1] + values[1:]) / 2, values.new_tensor([torch.inf])])


@cache
def _first_codes(is_signed: bool, device: torch.device) -> torch.Tensor:
    """For each first half of the bits of an fp32 number, the code of the least number that begins so, i32."""
    halves = torch.arange(1 << 16, dtype=torch.int32, device=device)
    least = (halves << 16) | (halves >= 1 << 15).int() * 0xFFFF
    return torch.bucketize(least.view(torch.float32), _bounds(is_signed, device)[:-1], out_int32=True)


def _nearest(numbers: torch.Tensor, is_signed: bool) -> torch.Tensor:
    """The code of the value nearest to each number from -1 to 1, i32 in one dimension.

    Numbers with the same first half of their bits lie within less than the distance of two bounds: there are two codes
    to choose from.
    """
    flat = numbers.reshape(-1)
    halves = (flat.view(torch.int32) >> 16) & 0xFFFF
    codes = _first_codes(is_signed, flat.device).index_select(0, halves)
    return codes.add_(flat > _bounds(is_signed, flat.device).index_select(0, codes))


def num_blocks(columns: int) -> int:
    """Blocks of a row."""
    return -(-columns // BLOCK)


def encode(numbers: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, *, is_signed: bool) -> None:
    """Write the code of the nearest value for each number, and the scales.

    What is not signed is a second moment, which is divided by: nothing of it becomes 0, unless all of a block is.

    Args:
        numbers: fp32 [rows, columns].
        codes: u8 [rows, columns].
        scales: fp32 [rows, blocks], the largest magnitude of each block.
        is_signed: whether there are numbers below 0.
    """
    blocks = _in_blocks(numbers)
    scales.copy_(blocks.abs().amax(-1))
    relative = blocks / scales.unsqueeze(-1).clamp(min=torch.finfo(torch.float32).tiny)
    found = _nearest(relative, is_signed).view(blocks.shape)
    if not is_signed:
        found.clamp_(min=1)
    codes.copy_(found.flatten(1)[:, : numbers.shape[1]])


def decode(codes: torch.Tensor, scales: torch.Tensor, *, is_signed: bool) -> torch.Tensor:
    """The numbers, fp32 [rows, columns]."""
    found = values_of(is_signed, codes.device).index_select(0, codes.reshape(-1).int()).view(codes.shape)
    return _in_blocks(found).mul_(scales.unsqueeze(-1)).flatten(1)[:, : codes.shape[1]]


def _in_blocks(numbers: torch.Tensor) -> torch.Tensor:
    """[rows, blocks, BLOCK], with zeros at the end of each row; a row of at most one block stays as long as it is."""
    rows, columns = numbers.shape
    count = num_blocks(columns)
    if count == 1:
        return numbers.view(rows, 1, columns)
    return F.pad(numbers, (0, count * BLOCK - columns)).view(rows, count, BLOCK)
