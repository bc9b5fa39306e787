"""Gradients of a sharded model as a whole: their norm, and scaling them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor


class Gradients:
    """The gradients of these parameters on this rank, as they are at the end of a step."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.sharded: list[torch.Tensor] = []
        self.whole: list[torch.Tensor] = []
        self.groups: set[dist.ProcessGroup] = set()
        for gradient in (p.grad for p in parameters):
            if isinstance(gradient, DTensor) and any(p.is_shard() for p in gradient.placements):
                self.sharded.append(gradient.to_local())
                self.groups.add(gradient.device_mesh.get_group(gradient.device_mesh.ndim - 1))
            elif gradient is not None:
                self.whole.append(gradient.to_local() if isinstance(gradient, DTensor) else gradient)

    def norm(self) -> float:
        """The 2-norm of all gradients of all ranks: the same number on each of them.

        Infinite or not a number if any gradient on any rank is.
        """
        square = _square(self.sharded)
        for group in self.groups:
            square = square.to(_device_of(group))
            dist.all_reduce(square, group=group)
        return float((square.cpu() + _square(self.whole).cpu()).sqrt())

    def scale(self, factor: float) -> None:
        """Multiply all of them."""
        for gradients in _alike(self.sharded + self.whole):
            torch._foreach_mul_(gradients, factor)


def _square(gradients: list[torch.Tensor]) -> torch.Tensor:
    """The sum of their squares, in fp64 so that it does not depend on how many ranks there are."""
    norms = [n.double() for some in _alike(gradients) for n in torch._foreach_norm(some, dtype=torch.float32)]
    device = norms[0].device if norms else torch.device("cpu")
    return torch.stack([n.to(device) for n in norms]).square().sum() if norms else torch.zeros((), dtype=torch.float64)


def _alike(gradients: list[torch.Tensor]) -> Iterable[list[torch.Tensor]]:
    """By device and dtype, those that are not empty."""
    found: dict[Any, list[torch.Tensor]] = {}
    for gradient in gradients:
        if gradient.numel():
            found.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    return found.values()


def _device_of(group: dist.ProcessGroup) -> torch.device:
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
