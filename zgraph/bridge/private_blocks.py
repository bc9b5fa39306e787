"""Checkpoints of DTensors that are cut in blocks: torch writes one chunk a rank, where each has one of every block.

Tried on torch 2.13.0: `compute_local_shape_and_global_offset` gives a cut in blocks the place of a plain cut, so that
what is saved at one layout and loaded at another would be other numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any, cast

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard, _StridedShard

from zgraph.ir.layout import Span, cut_spans

__all__ = ["install", "local_spans"]


def local_spans(tensor: DTensor) -> list[list[Span]]:
    """For each dim the runs of indices that this rank has, in the order in which it has them."""
    mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    assert coordinate is not None, "this rank is of the mesh"
    spans: list[list[Span]] = [[(0, size)] for size in tensor.shape]
    for axis, placement in enumerate(tensor.placements):
        if not isinstance(placement, Shard | _StridedShard):
            continue
        blocks = int(placement.split_factor) if isinstance(placement, _StridedShard) else 1
        spans[placement.dim] = cut_spans(spans[placement.dim], mesh.size(axis), coordinate[axis], blocks)
    return spans


def _chunks(tensor: DTensor) -> list[tuple[ChunkStorageMetadata, torch.Tensor]]:
    """The chunks of a tensor that this rank has, with its memory of each."""
    found = []
    spans = local_spans(tensor)
    placed = []
    for runs in spans:
        at, here = 0, []
        for start, length in runs:
            here.append((start, length, at))
            at += length
        placed.append(here)
    for runs_of_dims in product(*placed):
        local: torch.Tensor = tensor._local_tensor
        for dim, (_, length, at) in enumerate(runs_of_dims):
            local = local.narrow(dim, at, length)
        offsets, sizes = (torch.Size(run[i] for run in runs_of_dims) for i in (0, 1))
        found.append((ChunkStorageMetadata(offsets=offsets, sizes=sizes), local))
    return found


def _is_blocked(tensor: DTensor) -> bool:
    return any(isinstance(p, _StridedShard) for p in tensor.placements)


@cache
def install() -> None:
    """Have DTensors that are cut in blocks tell checkpoints of every block."""

    def items(self: DTensor, fqn: str, held: Any) -> Any:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk, properties=TensorProperties.create_from_tensor(self._local_tensor), size=held.size()
                ),
            )
            for chunk, _ in _chunks(self)
        ]

    def chunks(self: DTensor) -> Any:
        return [chunk for chunk, _ in _chunks(self)]

    def shard(self: DTensor, index: MetadataIndex) -> Any:
        return next(local for chunk, local in _chunks(self) if chunk.offsets == index.offset)

    for name, made in (
        ("__create_write_items__", items),
        ("__create_chunk_list__", chunks),
        ("__get_tensor_shard__", shard),
    ):
        setattr(DTensor, name, _or_torchs(cast(Callable[..., Any], getattr(DTensor, name)), made))


def _or_torchs(own: Callable[..., Any], made: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: DTensor, *args: Any) -> Any:
        return made(self, *args) if _is_blocked(self) else own(self, *args)

    return method
