"""Ops that know which part of a dim their rank has, as `zgraph.ir.rules.ranked` names them, on one rank.

Each has the arguments of the op of torch that it stands for, tensors as this rank has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from zgraph.bridge.aten import to_torch
from zgraph.ir import Node, Value

__all__ = ["Run", "runs"]

Run = Callable[..., Any]
"""From the tensors that a node reads, in the order of its operands, to what it makes."""


def embedding(rank: int, num_ranks: int, table: torch.Tensor, index: torch.Tensor, *_: Any) -> torch.Tensor:
    """The rows of `table` [V / N, D] that are looked up [...]; zeros [..., D] for rows of other ranks."""
    own, is_own = _own(index, rank, num_ranks, len(table), None)
    return torch.embedding(table, own).masked_fill_(~is_own.unsqueeze(-1), 0)


def int8_embedding(
    rank: int, num_ranks: int, table: torch.Tensor, index: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """The same of a table in int8 [V / N, D] with scales [V / N, 1], in fp32."""
    own, is_own = _own(index, rank, num_ranks, len(table), None)
    made = torch.embedding(table, own).float() * torch.embedding(scale, own)
    return made.masked_fill_(~is_own.unsqueeze(-1), 0)


def embedding_backward(
    rank: int,
    num_ranks: int,
    gradient: torch.Tensor,
    index: torch.Tensor,
    num_rows: int,
    padding: int = -1,
    by_count: bool = False,
) -> torch.Tensor:
    """The gradient of the rank's rows [V / N, D], of gradients [..., D] of what was looked up."""
    assert not by_count, "a part does not count how often a row is looked up"
    own, is_own = _own(index, rank, num_ranks, num_rows, padding)
    kept = gradient.masked_fill(~is_own.unsqueeze(-1), 0)
    made: torch.Tensor = torch.ops.aten.embedding_dense_backward(kept, own, num_rows, -1, False)
    return made


def nll_loss(
    rank: int,
    num_ranks: int,
    logs: torch.Tensor,
    target: torch.Tensor,
    _weight: None,
    reduction: int,
    ignored: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rank's addend of the loss of `logs` [T, V / N] and `target` [T], and how many labels count."""
    own, is_own = _own(target, rank, num_ranks, logs.shape[1], ignored)
    each = torch.where(is_own, -logs.gather(1, own.unsqueeze(1)).squeeze(1), 0)
    if reduction == 0:
        return each, each.new_zeros(())
    count = (target != ignored).sum().to(logs.dtype)
    return (each.sum() / count if reduction == 1 else each.sum()), count


def nll_loss_backward(
    rank: int,
    num_ranks: int,
    gradient: torch.Tensor,
    logs: torch.Tensor,
    target: torch.Tensor,
    _weight: None,
    reduction: int,
    ignored: int,
    count: torch.Tensor,
) -> torch.Tensor:
    """The gradient of the rank's classes, as `logs` [T, V / N]."""
    own, is_own = _own(target, rank, num_ranks, logs.shape[1], ignored)
    each = -gradient / count if reduction == 1 else -gradient
    made = torch.zeros_like(logs, memory_format=torch.contiguous_format)
    return made.scatter_(1, own.unsqueeze(1), torch.where(is_own, each, 0).to(logs.dtype).unsqueeze(1))


def grouped(rank: int, num_ranks: int, rows: torch.Tensor, by: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows [T, K] times the rank's matrices [E / N, K, N]; or [K, T] times [T, N], a matrix for each of its groups."""
    made: torch.Tensor = torch.ops.aten._grouped_mm(rows, by, _own_ends(ends, rank, num_ranks))
    return made


def grouped_fallback(
    rank: int, num_ranks: int, rows: torch.Tensor, by: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """The same by the op of transformers."""
    made: torch.Tensor = torch.ops.transformers.grouped_mm_fallback(rows, by, _own_ends(ends, rank, num_ranks))
    return made


def grouped_fallback_backward(
    rank: int, num_ranks: int, rows: torch.Tensor, by: torch.Tensor, ends: torch.Tensor, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of rows and of matrices."""
    backward = torch.ops.transformers.grouped_mm_fallback_backward
    made: tuple[torch.Tensor, torch.Tensor] = backward(rows, by, _own_ends(ends, rank, num_ranks), gradient)
    return made


def _own_ends(ends: torch.Tensor, rank: int, num_ranks: int) -> torch.Tensor:
    """Running counts of the rows of the rank's groups, of which the first begins at its first row."""
    count = len(ends) // num_ranks
    own = ends[rank * count : (rank + 1) * count]
    return own - ends[rank * count - 1] if rank else own.clone()


def _own(
    index: torch.Tensor, rank: int, num_ranks: int, count: int, ignored: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices among the rank's own, 0 where they are of another, and which are its own.

    Args:
        index: among those of all ranks.
        rank: this one.
        num_ranks: all of them.
        count: how many indices each rank has.
        ignored: an index that no rank has.

    Raises:
        IndexError: an index that is of no rank; on a GPU it is an assertion on the device, as torch's own is.
    """
    is_known = (index >= 0) & (index < num_ranks * count)
    counts = torch.ones_like(is_known) if ignored is None else index != ignored
    are_right = (is_known | ~counts).all()
    if index.device.type != "cpu":
        torch._assert_async(are_right)
    elif not are_right:
        raise IndexError(f"an index is out of range: it must be from 0 to {num_ranks * count - 1}")
    own = index - rank * count
    is_own = (own >= 0) & (own < count) & counts
    return torch.where(is_own, own, 0), is_own


_RUNS: Mapping[str, Run] = {
    "part_embedding": embedding,
    "part_int8_embedding": int8_embedding,
    "part_embedding_backward": embedding_backward,
    "part_nll_loss": nll_loss,
    "part_nll_loss_backward": nll_loss_backward,
    "part_grouped_mm": grouped,
    "part_grouped_mm_fallback": grouped_fallback,
    "part_grouped_mm_fallback_backward": grouped_fallback_backward,
}


def runs(node: Node, device: torch.device, rank: int, num_ranks: int) -> Run:
    """Runner of an op that knows its rank, which takes the tensors that it reads.

    Args:
        node: the op.
        device: where it computes.
        rank: the rank along its axis.
        num_ranks: ranks along the axis.
    """
    run = partial(_RUNS[node.op], rank, num_ranks)
    names = [v.name for v in node.operands]

    def execute(*tensors: torch.Tensor) -> Any:
        given = dict(zip(names, tensors, strict=True))

        def of(value: Value) -> torch.Tensor:
            return given[value.name]

        options = {k: to_torch(a, device, of) for k, a in node.kwargs if k != "axis"}
        return run(*(to_torch(a, device, of) for a in node.args), **options)

    return execute
