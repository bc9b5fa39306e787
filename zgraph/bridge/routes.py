"""Rows on their way between ranks that have them by position and ranks that have the groups that they belong to.

Every rank has the whole of the indices and of the running counts, so that each knows what it sends to which other, in
the order of the indices, and what it is sent. No sizes are exchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from zgraph.bridge.parts import along_axis
from zgraph.ir import Grouped, Mesh, Node, num_ranks
from zgraph.ir.axis_rules import axis_of

__all__ = ["Route", "arrived", "begun", "on_ranks", "route_of"]


@dataclass(frozen=True)
class Route:
    """Rows that one rank of an axis sends and is sent.

    Args:
        sent: positions of the rows that it sends among those that it has, for one rank after the other.
        num_sent: how many to each rank.
        found: where the rows that it is sent go among those that it makes, of one rank after the other.
        num_found: how many of each rank.
    """

    sent: torch.Tensor
    num_sent: list[int]
    found: torch.Tensor
    num_found: list[int]


def route_of(node: Node, tensors: Sequence[torch.Tensor], size: int, rank: int) -> Route:
    """The route of a start for one rank. The host waits for the indices.

    Args:
        node: the start.
        tensors: its operands, as the rank has them.
        size: ranks along its axis.
        rank: this one.

    Raises:
        IndexError: an index of no row.
    """
    is_put = node.op == "put_rows_start"
    at, ends = tensors[1], tensors[-1].long()
    moved = tensors[2] if is_put else tensors[0]
    place = node.operands[2 if is_put else 0].tensor.placement
    by_group = any(isinstance(p, Grouped) for p in place)
    made = node.results[0].tensor.shape
    here = torch.arange(len(at), device=at.device)
    one, other = (here, at) if is_put else (at, here)
    side = _Side(ends, size)
    sources = side.owners(one, len(moved), by_group=by_group)
    targets = side.owners(other, int(made[0]), by_group=not by_group)
    (from_rank, from_row), (to_rank, to_row) = sources, targets
    counts = (from_rank < size) & (to_rank < size)
    mine, theirs = counts & (from_rank == rank), counts & (to_rank == rank)
    sent, num_sent = _ordered(from_row[mine], to_rank[mine], size)
    found, num_found = _ordered(to_row[theirs], from_rank[theirs], size)
    return Route(sent, num_sent, found, num_found)


class _Side:
    """Who has a row, by its number among all.

    Args:
        ends: running counts of rows, up to the end of each group.
        size: ranks, each with as many groups.
    """

    def __init__(self, ends: torch.Tensor, size: int) -> None:
        self.size, count = size, len(ends) // size
        self.last = ends[count - 1 :: count].contiguous()

    def owners(self, rows: torch.Tensor, num_local: int, *, by_group: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The rank that has each row, and the row's number there; of no rank what no group has."""
        whole = num_local if by_group else num_local * self.size
        rows = torch.where(rows < 0, rows + whole, rows).long()
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < whole:
            raise IndexError(f"an index is out of range: it must be from 0 to {whole - 1}")
        if not by_group:
            return rows // num_local, rows % num_local
        rank = torch.searchsorted(self.last, rows, right=True)
        begin = torch.cat([self.last.new_zeros(1), self.last])
        return rank, rows - begin[rank]


def _ordered(rows: torch.Tensor, ranks: torch.Tensor, size: int) -> tuple[torch.Tensor, list[int]]:
    """Rows rank by rank, and how many of each."""
    order = torch.argsort(ranks, stable=True)
    return rows[order], torch.bincount(ranks, minlength=size).tolist()


def begun(node: Node, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Result of a start on a rank, without the rows that are on their way: zeros, or what they are added to."""
    if node.op == "put_rows_start":
        return tensors[0].clone(memory_format=torch.contiguous_format)
    return tensors[0].new_zeros([int(size) for size in node.results[0].tensor.shape])


def arrived(node: Node, made: torch.Tensor, rows: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Result of a start on a rank, with the rows that it was sent.

    Args:
        node: the start.
        made: what it has begun; it is changed.
        rows: those that the rank was sent.
        found: where they go.
    """
    if node.op == "put_rows_start":
        return made.index_put_((found,), rows, accumulate=True)
    made[found] = rows
    return made


def on_ranks(node: Node, operands: Sequence[Sequence[torch.Tensor]], mesh: Mesh) -> list[list[torch.Tensor]]:
    """Results of a start on all ranks of a mesh, each of which has to do with those along its axis alone.

    Args:
        node: the start.
        operands: each of them as every rank has it.
        mesh: of the graph.
    """
    made: dict[int, torch.Tensor] = {}
    for peers in along_axis(axis_of(node, mesh)[0], mesh):
        made.update(zip(peers, _among(node, [[ranks[peer] for ranks in operands] for peer in peers]), strict=True))
    return [[made[rank] for rank in range(num_ranks(mesh))]]


def _among(node: Node, ranks: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """Results of a start on the ranks of an axis, each of which has its operands."""
    at = 2 if node.op == "put_rows_start" else 0
    routes = [route_of(node, tensors, len(ranks), rank) for rank, tensors in enumerate(ranks)]
    sent = [torch.split(tensors[at][route.sent], route.num_sent) for tensors, route in zip(ranks, routes, strict=True)]
    return [
        arrived(node, begun(node, tensors), torch.cat([parts[rank] for parts in sent]), route.found)
        for rank, (tensors, route) in enumerate(zip(ranks, routes, strict=True))
    ]
