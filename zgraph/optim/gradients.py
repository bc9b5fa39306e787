"""Gradients of a rank's shards as one run of numbers, of which any part can be made, and which can be written back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from zgraph.optim.runs import like, local


class FlatGradients:
    """Gradients of parameters, in order, with a number before them for each: 1 where it has a gradient.

    Args:
        parameters: that are trained.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = [*parameters]
        wide = any(p.dtype == torch.float64 for p in parameters)
        self.dtype = torch.float64 if wide else torch.float32
        self.starts: list[int] = []
        self.numel = len(self.parameters)
        for parameter in self.parameters:
            self.starts.append(self.numel)
            self.numel += local(parameter).numel()

    def piece(self, begin: int, end: int) -> torch.Tensor:
        """A copy of the numbers from one place to another, on the host."""
        flags = torch.tensor([float(p.grad is not None) for p in self.parameters[begin:end]], dtype=self.dtype)
        parts = [flags]
        for parameter, start in zip(self.parameters, self.starts, strict=True):
            numel = local(parameter).numel()
            first, last = max(begin - start, 0), min(end - start, numel)
            if first < last:
                gradient = parameter.grad
                if gradient is None:
                    parts.append(torch.zeros(last - first, dtype=self.dtype))
                else:
                    parts.append(local(gradient).reshape(-1)[first:last].to("cpu", self.dtype))
        return torch.cat(parts)

    @torch.no_grad()
    def put(self, flat: torch.Tensor) -> None:
        """Write all back; a gradient that some replica has is there on all."""
        flags = flat[: len(self.parameters)].tolist()
        for parameter, start, flag in zip(self.parameters, self.starts, flags, strict=True):
            if not flag:
                continue
            held = local(parameter)
            found = flat[start : start + held.numel()].view(held.shape)
            if parameter.grad is None:
                parameter.grad = like(parameter, found.to(held.device, held.dtype, copy=True))
            else:
                local(parameter.grad).copy_(found)

    def drop(self) -> None:
        """Leave no gradient, so that no parameter is updated."""
        for parameter in self.parameters:
            parameter.grad = None
