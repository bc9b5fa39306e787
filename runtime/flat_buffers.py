"""Flat buffers: the parts of many tensors side by side, so that a bucket and an optimizer see contiguous memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from zgraph.ir.layout import MEMBER_ALIGN_BYTES
from zgraph.runtime.host import HostMemory


class Part(NamedTuple):
    """Request of one tensor: how many elements of a dtype, on the host or the device, and its alignment in elements."""

    numel: int
    dtype: torch.dtype
    on_host: bool
    align: int


def align_numel(dtype: torch.dtype) -> int:
    """Elements between places where a tensor of a bucket may begin."""
    return max(1, MEMBER_ALIGN_BYTES // dtype.itemsize)


class Flats:
    """One buffer for all parts of one kind, each part aligned, in the order given.

    Args:
        parts: the request of each name.
        device: for what is not on the host.
        host: for what is.
    """

    def __init__(self, parts: Mapping[str, Part], device: torch.device, host: HostMemory) -> None:
        sizes: dict[tuple[torch.dtype, bool], int] = {}
        places: dict[str, int] = {}
        for name, part in parts.items():
            key = part.dtype, part.on_host
            places[name] = -(-sizes.get(key, 0) // part.align) * part.align
            sizes[key] = places[name] + part.numel
        self.buffers = {
            (dtype, on_host): host.pool.empty((numel,), dtype).zero_()
            if on_host
            else torch.zeros(numel, dtype=dtype, device=device)
            for (dtype, on_host), numel in sizes.items()
        }
        self.views = {
            name: self.buffers[part.dtype, part.on_host][places[name] : places[name] + part.numel]
            for name, part in parts.items()
        }

    def num_bytes(self, *, on_host: bool) -> int:
        """Bytes of the buffers on the host, or of those on the device."""
        found = (buffer for (_, here), buffer in self.buffers.items() if here == on_host)
        return sum(buffer.nbytes for buffer in found)
