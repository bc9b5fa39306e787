"""Parts of tensors along a model axis, as `zgraph.ir.parts` types them: cut, put together, and laid out in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from zgraph.errors import InterpretError
from zgraph.ir.layout import chunk_numel
from zgraph.ir.types import Mesh, Partial, Placement, Replicate, Shard, TensorType, model_axes, num_ranks


def cut(tensor: torch.Tensor, place: Shard, num_ranks: int) -> list[torch.Tensor]:
    """The parts that ranks have of a tensor: of each block of a dim its chunk, one after the other."""
    blocks = torch.split(tensor, _sizes(tensor.shape[place.dim], place), place.dim)
    pieces = [block.chunk(num_ranks, place.dim) for block in blocks]
    return [torch.cat([piece[rank] for piece in pieces], place.dim) for rank in range(num_ranks)]


def joined(parts: Sequence[torch.Tensor], place: Shard) -> torch.Tensor:
    """The tensor that ranks have these parts of."""
    sizes = _sizes(parts[0].shape[place.dim], place)
    pieces = [torch.split(part, sizes, place.dim) for part in parts]
    return torch.cat([pieces[rank][block] for block in range(len(sizes)) for rank in range(len(parts))], place.dim)


def padded_chunks(tensor: torch.Tensor, kind: TensorType, count: int) -> list[torch.Tensor]:
    """The chunks of a whole tensor's numbers for so many ranks of data, the last ones with zeros behind them."""
    chunk = chunk_numel(kind.shape, count)
    padded = tensor.new_zeros(chunk * count)
    padded[: tensor.numel()] = tensor.reshape(-1)
    return list(torch.split(padded, chunk)) if chunk else [padded] * count


def from_chunks(chunks: list[torch.Tensor], kind: TensorType) -> torch.Tensor:
    """A whole tensor from its padded chunks."""
    sizes = [int(d) for d in kind.shape]
    return torch.cat(chunks)[: int(kind.numel)].view(sizes).clone()


def laid_out(tensor: torch.Tensor, kind: TensorType) -> torch.Tensor:
    """A copy of a tensor that lies in memory as its type says."""
    if kind.strides is None:
        return tensor.clone(memory_format=torch.contiguous_format)
    strides = [int(s) for s in kind.strides]
    made = torch.empty_strided(
        [1 if s == 0 else n for n, s in zip(tensor.shape, strides, strict=True)],
        strides,
        dtype=tensor.dtype,
        device=tensor.device,
    )
    for dim, stride in enumerate(strides):
        if stride == 0:
            tensor = tensor.narrow(dim, 0, min(1, tensor.shape[dim]))
    made.copy_(tensor)
    return made.expand([int(n) for n in kind.shape])


def total(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum in the order of the ranks."""
    found = values[0].clone()
    for value in values[1:]:
        found = found + value
    return found


def together(parts: Sequence[torch.Tensor], place: Placement) -> torch.Tensor:
    """The value that the ranks of a model axis have together: their parts joined or reduced, or what each has."""
    if isinstance(place, Shard):
        return joined(parts, place)
    if place == Partial("max"):
        return torch.stack(list(parts)).amax(0)
    return total(parts) if isinstance(place, Partial) else parts[0]


def part_of(tensor: torch.Tensor, kind: TensorType, mesh: Mesh, number: int) -> torch.Tensor:
    """The part of a whole tensor that the ranks have whose number along the model axes is `number`.

    Raises:
        InterpretError: it does not divide.
    """
    axes = model_axes(mesh)
    for index, (axis, place) in enumerate(zip(axes, kind.placement, strict=False)):
        rank = number // num_ranks(axes[index + 1 :]) % axis.size
        if isinstance(place, Shard):
            if place.dim >= tensor.dim() or not place.divides(tensor.shape[place.dim], axis.size):
                raise InterpretError(f"a tensor of shape {tuple(tensor.shape)} does not divide into {kind}")
            tensor = cut(tensor, place, axis.size)[rank]
        elif isinstance(place, Partial) and rank:
            tensor = torch.zeros_like(tensor)
    return tensor


def along_axis(index: int, mesh: Mesh) -> Iterator[range]:
    """The ranks of a mesh in groups, those of each of which differ along one axis alone, in its order.

    Args:
        index: the number of the axis.
        mesh: the mesh.
    """
    step, size = num_ranks(mesh[index + 1 :]), mesh[index].size
    for first in (rank for rank in range(num_ranks(mesh)) if rank // step % size == 0):
        yield range(first, first + step * size, step)


def moved(
    ranks: Sequence[torch.Tensor], old: TensorType, new: TensorType, index: int, mesh: Mesh
) -> list[torch.Tensor]:
    """A value at another placement along a model axis: among the ranks that differ along it alone."""
    size, place = mesh[index].size, new.placement[index]
    found = list(ranks)
    for peers in along_axis(index, mesh):
        whole_tensor = together([ranks[peer] for peer in peers], old.placement[index])
        if isinstance(place, Shard):
            parts = cut(whole_tensor, place, size)
        elif isinstance(place, Replicate):
            parts = [whole_tensor] * size
        else:
            parts = [whole_tensor, *(torch.zeros_like(whole_tensor) for _ in peers[1:])]
        for peer, part in zip(peers, parts, strict=True):
            found[peer] = laid_out(part, new)
    return found


def _sizes(size: int, place: Shard) -> list[int]:
    """The sizes of the blocks of a dim, or of a rank's parts of them."""
    unit = size // sum(place.blocks)
    return [unit * block for block in place.blocks]
