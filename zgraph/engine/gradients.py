"""Gradients of a sharded model as a whole: their norm, and scaling them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor


class Gradients:
    """The gradients of these parameters on this rank, as they are at the end of a step."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.sharded: dict[tuple[dist.ProcessGroup, ...], list[torch.Tensor]] = {}
        self.whole: list[torch.Tensor] = []
        for gradient in (p.grad for p in parameters):
            if isinstance(gradient, DTensor) and (axes := _cut_axes(gradient)):
                groups = tuple(gradient.device_mesh.get_group(axis) for axis in axes)
                self.sharded.setdefault(groups, []).append(gradient.to_local())
            elif gradient is not None:
                self.whole.append(gradient.to_local() if isinstance(gradient, DTensor) else gradient)

    def norm(self) -> torch.Tensor:
        """The 2-norm of all gradients of all ranks: the same number on each of them, in fp64, on a GPU if any is there.

        Infinite or not a number if any gradient on any rank is.
        """
        squares = [_square(self.whole)]
        for groups, gradients in self.sharded.items():
            square = _square(gradients)
            for group in groups:
                square = square.to(_device_of(group))
                dist.all_reduce(square, group=group)
            squares.append(square)
        device = next((square.device for square in squares if square.is_cuda), squares[-1].device)
        return torch.stack([square.to(device) for square in squares]).sum().sqrt()

    def scale(self, factor: float | torch.Tensor) -> None:
        """Multiply all of them. The host waits for the factor only where gradients are in its memory."""
        for gradients in _alike([*self.whole, *chain.from_iterable(self.sharded.values())]):
            if isinstance(factor, torch.Tensor) and gradients[0].is_cuda:
                multiply(gradients, factor)
            elif (number := float(factor)) != 1:
                torch._foreach_mul_(gradients, number)


def _cut_axes(gradient: DTensor) -> list[int]:
    """The axes of its mesh along which each rank has another part of it."""
    return [axis for axis, p in enumerate(gradient.placements) if not p.is_replicate() and not p.is_partial()]


def multiply(gradients: list[torch.Tensor], factor: torch.Tensor) -> None:
    """Multiply gradients of one dtype, in fp32 or more, by a number that the host does not know yet."""
    dtype = gradients[0].dtype
    if dtype in (torch.float32, torch.float64):
        torch._foreach_mul_(gradients, factor.to(dtype))
        return
    exact = factor.to(torch.float32).view(1)  # of one dimension: it would be rounded to the gradients' dtype else
    for gradient in gradients:
        torch.mul(gradient, exact, out=gradient)


def _square(gradients: list[torch.Tensor]) -> torch.Tensor:
    """The sum of their squares, in fp64 so that it does not depend on how many ranks there are."""
    norms = [torch.stack(torch._foreach_norm(some, dtype=torch.float32)).double() for some in _alike(gradients)]
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    device = next((n.device for n in norms if n.is_cuda), norms[0].device)
    return torch.cat([n.to(device) for n in norms]).square().sum()


def _alike(gradients: list[torch.Tensor]) -> Iterable[list[torch.Tensor]]:
    """By device and dtype, those that are not empty."""
    found: dict[Any, list[torch.Tensor]] = {}
    for gradient in gradients:
        if gradient.numel():
            found.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    return found.values()


def _device_of(group: dist.ProcessGroup) -> torch.device:
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
