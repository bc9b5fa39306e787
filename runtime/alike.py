"""Whether ranks that compute one op together were given the same: their inputs, and what they draw from.

Each call, every rank makes a number of all of it, and the ranks of a model axis compare theirs. On a GPU, where the
host must not wait, a call says what the one before it has found, unless ranks share experts. Those have batches of
their own, which are alike in their shapes, and become one batch in front of the model.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

from zgraph.errors import BatchMismatchError, UsageError
from zgraph.ir import MODEL_AXES
from zgraph.runtime.session import Session

BATCHES = "expert"
"""The axis whose ranks have batches of their own."""


class Alike:
    """Compares calls along the model axes.

    Args:
        session: of the model.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.axes = [axis.name for axis in session.store.ranks.axes if axis.name in MODEL_AXES]
        self.pending: list[tuple[str, dist.Work, torch.Tensor]] = []

    def check(self, args: Any) -> None:
        """Compare the arguments of a call.

        Raises:
            BatchMismatchError: on all ranks of an axis, if one of them was given something else.
        """
        self._finish()
        device = self.session.device
        leaves, draws = list(_leaves(args)), _generator(device)
        words = [_word(leaf, device) for leaf in leaves]
        num_rows = rows_of(args)
        shapes = [
            w * w.new_tensor([1, 0]) if is_of_rows(x, num_rows) else w for x, w in zip(leaves, words, strict=True)
        ]
        for axis in self.axes:
            word = torch.cat([_together(shapes if axis == BATCHES else words, device), draws])
            found = torch.cat([word, -word])
            group = self.session.store.ranks.axis_group(axis)
            work = dist.all_reduce(found, dist.ReduceOp.MAX, group=group, async_op=True)
            self.pending.append((axis, work, found))
        if device.type == "cpu" or BATCHES in self.axes:  # before other shapes would be joined
            self._finish()

    def _finish(self) -> None:
        pending, self.pending = self.pending, []
        for axis, work, found in pending:
            self.session.peers.wait(work, f"the comparison of batches along {axis}")
            differs = (found[:3] + found[3:]).tolist()  # the largest of the ranks', and their smallest
            ranks = dist.get_process_group_ranks(self.session.store.ranks.axis_group(axis))
            own = self.session.store.ranks
            if any(differs[:2]) and axis == BATCHES:
                raise BatchMismatchError(
                    f"the ranks {ranks} share experts, but were given batches of other shapes, or other inputs without "
                    "rows, in one call. Pad them alike, to one length (a collator's pad_to_multiple_of=, or one entry "
                    "in lengths=), with as many rows on each"
                )
            if any(differs[:2]):
                raise BatchMismatchError(
                    f"the ranks {ranks} compute together along {axis}, but were given other inputs in one call. Give "
                    f"them the same batch: a sampler has num_replicas={own.num_batches} and, on this rank, "
                    f"rank={own.batch_rank}"
                )
            if differs[2]:
                raise BatchMismatchError(
                    f"the ranks {ranks} compute together along {axis}, but draw other random numbers. Seed them alike, "
                    f"with torch.manual_seed(seed + {own.data_rank}) on this rank"
                )


def same_batches(forward: Callable[..., Any], session: Session) -> Callable[..., Any]:
    """The model's forward, which compares its arguments along the model axes first.

    Where ranks share experts, it has the batches of all of them, one behind the other. What it returns is of the rows
    of each rank (`zgraph.passes.place`).
    """
    alike = Alike(session)
    has_batches = BATCHES in alike.axes

    def zgraph_forward(*args: Any, **kwargs: Any) -> Any:
        alike.check((args, kwargs))
        if has_batches:
            args, kwargs = _joined((args, kwargs), session)
        return forward(*args, **kwargs)

    zgraph_forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return zgraph_forward


def rows_of(args: Any) -> int:
    """Rows of a rank's batch: those of `input_ids`, else of the first input that has dims; 0 where none has.

    Args:
        args: positional arguments, and those by name.
    """
    ids = args[1].get("input_ids")
    if isinstance(ids, torch.Tensor) and ids.dim():
        return ids.shape[0]
    return next((x.shape[0] for x in _leaves(args) if isinstance(x, torch.Tensor) and x.dim()), 0)


def is_of_rows(leaf: Any, num_rows: int) -> bool:
    """Whether an input has a row for each of the batch."""
    return isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] == num_rows


def _joined(args: Any, session: Session) -> Any:
    """The arguments of a call with the rows of all ranks that share experts, in the order of these."""
    group, num_rows = session.store.ranks.axis_group(BATCHES), rows_of(args)
    size = dist.get_world_size(group)

    def joined(tensor: torch.Tensor) -> torch.Tensor:
        if not is_of_rows(tensor, num_rows):
            return tensor
        if tensor.requires_grad:
            raise UsageError(
                "an input that requires a gradient cannot be shared by the ranks of expert_parallel=; detach it, or "
                "make it in the model"
            )
        sent = tensor.contiguous().flatten().view(torch.uint8)
        found = [torch.empty_like(sent) for _ in range(size)]
        work = dist.all_gather(found, sent, group=group, async_op=True)
        assert work is not None, "this rank is of the group"
        session.peers.wait(work, "the batches of ranks that share experts")
        return torch.cat(found).view(tensor.dtype).view(size * num_rows, *tensor.shape[1:])

    return pytree.tree_map_only(torch.Tensor, joined, args)


def _leaves(args: Any) -> Iterator[Any]:
    if isinstance(args, torch.Tensor | int | float | bool):
        yield args
    elif isinstance(args, dict):
        for key in sorted(args, key=str):
            yield from _leaves(args[key])
    elif isinstance(args, list | tuple):
        for item in args:
            yield from _leaves(item)


def _together(words: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Two numbers of any number of inputs, in their order."""
    if not words:
        return torch.zeros(2, dtype=torch.int64, device=device)
    weights = torch.arange(len(words), device=device) * 2 + 1
    return (torch.stack(words) * weights.unsqueeze(1)).sum(0)


def _word(leaf: Any, device: torch.device) -> torch.Tensor:
    """Two numbers of an input: of its shape, and of its bytes."""
    if not isinstance(leaf, torch.Tensor):
        return torch.tensor([0, zlib.crc32(repr(leaf).encode())], dtype=torch.int64, device=device)
    kind = zlib.crc32(f"{tuple(leaf.shape)} {leaf.dtype}".encode())
    raw = leaf.detach().contiguous().reshape(-1).view(torch.uint8)
    if raw.device.type == "cpu":
        return torch.tensor([kind, zlib.crc32(raw.numpy().tobytes())], dtype=torch.int64, device=device)
    weights = torch.arange(raw.numel(), device=raw.device) % 65521 + 1
    return torch.stack([torch.full((), kind, dtype=torch.int64, device=raw.device), (raw * weights).sum()])


def _generator(device: torch.device) -> torch.Tensor:
    """A number of the state of the generator that dropout draws from."""
    state = torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)
    return torch.tensor([zlib.crc32(state.numpy().tobytes())], dtype=torch.int64, device=device)
