"""Whether ranks that compute one op together were given the same: their inputs, and what they draw from.

Each call, every rank makes a number of all of it, and the ranks of a model axis compare theirs. On a GPU, where the
host must not wait, a call says what the one before it has found.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from zgraph.errors import BatchMismatchError
from zgraph.ir import MODEL_AXES
from zgraph.runtime.session import Session


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
        word = torch.cat([_together([_word(leaf, device) for leaf in _leaves(args)], device), _generator(device)])
        both = torch.cat([word, -word])
        for axis in self.axes:
            found = both.clone()
            group = self.session.store.ranks.axis_group(axis)
            work = dist.all_reduce(found, dist.ReduceOp.MAX, group=group, async_op=True)
            self.pending.append((axis, work, found))
        if device.type == "cpu":
            self._finish()

    def _finish(self) -> None:
        pending, self.pending = self.pending, []
        for axis, work, found in pending:
            self.session.peers.wait(work, f"the comparison of batches along {axis}")
            differs = (found[:3] + found[3:]).tolist()  # the largest of the ranks', and their smallest
            ranks = dist.get_process_group_ranks(self.session.store.ranks.axis_group(axis))
            if any(differs[:2]):
                raise BatchMismatchError(
                    f"the ranks {ranks} compute together along {axis}, but were given other inputs in one call. Give "
                    f"them the same batch: a sampler has num_replicas={self.session.num_ranks} and, on this rank, "
                    f"rank={self.session.store.data_rank}"
                )
            if differs[2]:
                raise BatchMismatchError(
                    f"the ranks {ranks} compute together along {axis}, but draw other random numbers. Seed them alike, "
                    f"with torch.manual_seed(seed + {self.session.store.data_rank}) on this rank"
                )


def same_batches(forward: Callable[..., Any], session: Session) -> Callable[..., Any]:
    """The model's forward, which compares its arguments along the model axes first."""
    alike = Alike(session)

    def zgraph_forward(*args: Any, **kwargs: Any) -> Any:
        alike.check((args, kwargs))
        return forward(*args, **kwargs)

    zgraph_forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return zgraph_forward


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
