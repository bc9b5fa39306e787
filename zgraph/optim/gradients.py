"""Gradients of a rank's shards as one run of numbers, of which any part can be made, and which can be written back; and
a model's buffers as one run of bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from zgraph.errors import UsageError
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


class FlatBuffers:
    """Buffers of a model, one behind the other, as bytes: equal to the last bit, whatever their dtype.

    Args:
        model: whose buffers; None for none.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._model = model
        self.num_bytes = sum(buffer.nbytes for buffer in self._held())

    def _held(self) -> list[torch.Tensor]:
        return [local(buffer) for buffer in self._model.buffers()] if self._model is not None else []

    def piece(self, begin: int, end: int) -> torch.Tensor:
        """A copy of the bytes from one place to another, on the host.

        Raises:
            UsageError: the model has other buffers than at the beginning.
        """
        held, at = self._held(), 0
        if sum(buffer.nbytes for buffer in held) != self.num_bytes:
            raise UsageError(
                "the model's buffers have another size than when zgraph.elastic was called: make them before it, or "
                "give broadcast_buffers=False"
            )
        parts = []
        for buffer in held:
            first, last = max(begin - at, 0), min(end - at, buffer.nbytes)
            if first < last:
                parts.append(_as_bytes(buffer)[first:last].cpu())
            at += buffer.nbytes
        return torch.cat(parts)

    @torch.no_grad()
    def put(self, flat: torch.Tensor) -> None:
        """Write all back."""
        at = 0
        for buffer in self._held():
            if buffer.nbytes:
                found = flat[at : at + buffer.nbytes].clone().view(buffer.dtype).view(buffer.shape)
                buffer.copy_(found)
            at += buffer.nbytes


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, [numbers times their size] on the host; one memory where it is there already."""
    return _as_bytes(tensor.detach().cpu())


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, where it is."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
