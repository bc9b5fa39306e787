"""Updates in several ops of torch: a processor does all of them on one block, which stays in its cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from zgraph.optim.runs import Piece

BLOCK_NUMEL = 1 << 17

Tensors = list[torch.Tensor]


def blocks(pieces: Sequence[Piece]) -> Iterator[tuple[Tensors, ...]]:
    """Parameters, gradients and each of the states to update at once: small pieces together, on processors large ones
    cut."""
    waiting: list[tuple[torch.Tensor, ...]] = []
    numel = 0
    for tensors in (part for piece in pieces for part in _cut(piece.tensors)):
        if waiting and numel + tensors[0].numel() > BLOCK_NUMEL:
            yield _columns(waiting)
            waiting, numel = [], 0
        waiting.append(tensors)
        numel += tensors[0].numel()
    if waiting:
        yield _columns(waiting)


def _cut(tensors: tuple[torch.Tensor, ...]) -> Iterator[tuple[torch.Tensor, ...]]:
    is_small = tensors[0].is_cuda or tensors[0].numel() <= BLOCK_NUMEL
    if is_small or not all(t.is_contiguous() for t in tensors):
        return iter([tensors])
    return zip(*(torch.split(t.view(-1), BLOCK_NUMEL) for t in tensors), strict=True)


def _columns(rows: list[tuple[torch.Tensor, ...]]) -> tuple[Tensors, ...]:
    return tuple(list(column) for column in zip(*rows, strict=True))
