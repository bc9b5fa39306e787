"""Updates of what is on the host or on disk: a piece is brought to where it is updated while the one before it is
updated, and the one before that is taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from zgraph.optim.runs import Piece
from zgraph.runtime.disk import DiskFile
from zgraph.runtime.host import PAGE_BYTES, Copy, HostMemory

NUM_LEAVING = 6
"""Copies back that may be under way: those of two pieces."""

Update = Callable[[Piece], None]


def stream(
    pieces: Sequence[Piece], chunk_bytes: int, host: HostMemory, disk: DiskFile | None, stays: bool, update: Update
) -> None:
    """Update pieces elsewhere, part by part.

    Args:
        pieces: what is updated.
        chunk_bytes: how much of a tensor is streamed at once.
        host: the host's memory, and the lanes between it and the device.
        disk: the file that has the states, if they are read and written directly.
        stays: whether the update runs on the host, so that what is there is not copied.
        update: updates a piece in place.
    """
    waiting: list[_Visit] = []
    leaving: list[tuple[Copy, torch.Tensor]] = []

    def work_off() -> None:
        leaving.extend(waiting.pop(0).update(update))
        while len(leaving) > NUM_LEAVING:
            copy, _ = leaving.pop(0)  # the tensor that is read lives until then
            copy.synchronize()

    for part in (part for piece in pieces for part in _parts(piece, chunk_bytes)):
        waiting.append(_Visit(part, host, disk, stays))
        if len(waiting) > 1:
            work_off()
    while waiting:
        work_off()
    for copy, _ in leaving:
        copy.synchronize()


def _parts(piece: Piece, chunk_bytes: int) -> Iterator[Piece]:
    """Pieces of whole pages a tensor, as the disk asks for and as vectors of torch's kernel begin; one where a tensor
    is not dense."""
    part_bytes = max(chunk_bytes // PAGE_BYTES, 1) * PAGE_BYTES
    size = max(part_bytes // piece.parameter.element_size(), 1)
    if piece.parameter.numel() <= size or not all(t.is_contiguous() for t in piece.tensors):
        yield piece
        return
    for at in range(0, piece.parameter.numel(), size):
        parameter, gradient, *states = (t.view(-1)[at : at + size] for t in piece.tensors)
        yield Piece(parameter, gradient, tuple(states))


class _Visit:
    """A piece on its way to where it is updated, and back.

    Args:
        piece: what is updated.
        host: the host's memory, and the lanes between it and the device.
        disk: the file that has the states, if they are read and written directly.
        stays: whether the update runs on the host, so that what is there is not copied.
    """

    def __init__(self, piece: Piece, host: HostMemory, disk: DiskFile | None, stays: bool) -> None:
        self.piece, self.host, self.disk, self.stays = piece, host, disk, stays
        self.copies: list[Copy] = []
        self.blocks: dict[int, torch.Tensor] = {}
        self.here = [self._bring(number, tensor) for number, tensor in enumerate(piece.tensors)]

    def _bring(self, number: int, tensor: torch.Tensor) -> torch.Tensor:
        """Where the update finds a tensor of the piece; a block, where it comes from the disk."""
        if self.disk is not None and self.disk.holds(tensor):
            brought, copy = self.disk.read(tensor, self.host.pool)
            self.blocks[number] = brought
        elif tensor.is_cuda or self.stays:
            return tensor
        else:
            brought, copy = self.host.reload(tensor)
        self.copies.append(copy)
        return brought

    def update(self, update: Update) -> list[tuple[Copy, torch.Tensor]]:
        """Update it, and begin to take back what changed."""
        for copy in self.copies:
            copy.wait()
        if not self.stays:
            for number, block in self.blocks.items():
                self.here[number], copy = self.host.reload(block)
                copy.wait()
        parameter, gradient, *states = self.here
        update(Piece(parameter, gradient, tuple(states)))
        return [
            (self._take_back(number, home, here), here)
            for number, (home, here) in enumerate(zip(self.piece.tensors, self.here, strict=True))
            if home is not here and home is not self.piece.gradient
        ]

    def _take_back(self, number: int, home: torch.Tensor, here: torch.Tensor) -> Copy:
        block = self.blocks.get(number)
        if block is None:
            return self.host.to_host.start(home, here)
        assert self.disk is not None
        return self.disk.write(home, block, None if block is here else self.host.to_host.start(block, here))
