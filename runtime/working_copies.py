"""Copies to compute with, where those are another memory than the masters: made anew when a master changed.

Masters on the host whose copies are on a GPU are cast on the host, into pinned memory beside them; an optimizer may do
so with its update. From there they are brought on the lane of copies, in the order of the layers. A program waits for a
copy where it first reads it: computing begins while later layers are still on their way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

from zgraph.runtime.host import Copy, HostMemory


class Copied(Protocol):
    """A parameter whose copy is another memory: master, what is computed with, and what is cast beside the master."""

    rest: torch.Tensor
    working: torch.Tensor
    beside: torch.Tensor | None


def are_brought(device: torch.device) -> bool:
    """Whether copies on this device are another memory than what is cast on the host."""
    return device.type != "cpu"


class WorkingCopies:
    """The copies of one model.

    Args:
        slots: those whose copy is another memory than the master, in the order of the layers.
        host: the host's memory, and the lanes of copies.
        version: grows whenever a master is written to.
    """

    def __init__(self, slots: Sequence[Copied], host: HostMemory, version: Callable[[], int]) -> None:
        self.host, self.version = host, version
        self._cast = [s for s in slots if s.beside is not None]
        self._brought = [s for s in slots if s.beside is not s.working]
        self._cast_version = self._brought_version = -1
        self._arriving: dict[int, Copy] = {}
        self._addresses = {s.working.data_ptr() for s in self._brought}

    def refresh(self) -> None:
        """Make the copies anew, if a master has changed since. Those on a device are on their way then."""
        if not self._cast and not self._brought:
            return
        version = self.version()
        if self._cast_version != version:
            self.settle()
            with torch.no_grad():
                for slot in self._cast:
                    assert slot.beside is not None
                    slot.beside.copy_(slot.rest)
                    self._bring(slot)
        elif self._brought_version != version:
            for slot in self._cast:
                self._bring(slot)
        if self._brought_version != version:
            for slot in self._brought:
                if slot.beside is None:
                    self._bring(slot)
        self._cast_version = self._brought_version = version

    def _bring(self, slot: Copied) -> None:
        if slot.beside is not slot.working:
            source = slot.rest if slot.beside is None else slot.beside
            self._arriving[slot.working.data_ptr()] = self.host.to_device.start(slot.working, source)

    def is_brought(self, tensor: object) -> bool:
        """Whether this is a copy that is brought from the host."""
        return isinstance(tensor, torch.Tensor) and tensor.data_ptr() in self._addresses

    def arrive(self, *tensors: torch.Tensor) -> None:
        """Have what computes wait for these copies, if they are on their way."""
        for tensor in tensors if self._arriving else ():
            if (copy := self._arriving.pop(tensor.data_ptr(), None)) is not None:
                copy.wait()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Context for an update that writes masters and what is cast of them: what was right before stays right."""
        were_right = self._cast_version == self.version()
        yield
        if were_right:
            self._cast_version = self.version()
            if not self._brought:
                self._brought_version = self._cast_version

    def settle(self) -> None:
        """Wait for copies that still read the host's memory: somebody is about to write there."""
        self.host.to_device.settle()
        for copy in self._arriving.values():
            copy.synchronize()
