"""Scales of float8, and numbers cast with them, as torchao's `Float8Linear` has it (`torchao/float8`, `tensorwise`).

A scale is the dtype's largest number over the largest magnitude, in fp64 and then fp32. What is cast is multiplied in
fp32 and saturates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from zgraph.bridge.aten import TO_TORCH
from zgraph.ir import DType, Mesh, Node
from zgraph.ir.float8_rules import PIECE

__all__ = ["EPS", "PARTS", "PIECE", "cast", "cast_in_pieces", "largest", "on_ranks", "runs", "scale_of"]

EPS = 1e-12
"""The smallest magnitude that a scale is made for."""

PARTS = ("amax", "float8_scale", "float8_cast")
"""Ops of a rank's part of a value that is moved in float8."""


def largest(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of at least one number, in fp32 or fp64, [1]; that of a NaN is one."""
    low, high = torch.aminmax(x)
    found = torch.maximum(high, -low).view(1)
    return found if x.dtype == torch.float64 else found.float()


def scale_of(amax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The scale by a largest magnitude, in fp32."""
    return (torch.finfo(dtype).max / amax.double().clamp(min=EPS)).float()


def cast(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers times their scale in float8."""
    limit = torch.finfo(dtype).max
    return (x.float() * scale).clamp(-limit, limit).to(dtype)


def cast_in_pieces(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`cast` of a dense tensor, some numbers at a time: the same numbers, without copies of the whole."""
    made = torch.empty_like(x, dtype=dtype)
    for piece, out in zip(torch.split(x.view(-1), PIECE), torch.split(made.view(-1), PIECE), strict=True):
        out.copy_(cast(piece, scale, dtype))
    return made


def runs(node: Node) -> Callable[..., torch.Tensor]:
    """The function of one of `PARTS`: from what a rank has to what it makes."""
    if node.op == "amax":
        return largest
    dtype = node.option("dtype")
    assert isinstance(dtype, DType)
    wanted = TO_TORCH[dtype]
    if node.op == "float8_scale":
        return lambda amaxes: scale_of(amaxes.amax(), wanted)
    return lambda chunk, scale: cast_in_pieces(chunk, scale, wanted)


def on_ranks(node: Node, operands: list[list[torch.Tensor]], mesh: Mesh) -> Sequence[list[torch.Tensor]]:
    """One of `PARTS` on each of several ranks, given what each has of each operand."""
    run = runs(node)
    return [[run(*own) for own in zip(*operands, strict=True)]]
