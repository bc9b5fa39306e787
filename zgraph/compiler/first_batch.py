"""Ranks that begin with batches of other sizes: padded by batch, packed, or the short end of a loader.

All ranks compare their first graphs, so these are captured with the same sizes, or with symbols for the sizes that
differ. Later, each rank may meet other sizes alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils import _pytree as pytree

from zgraph.bridge.private_compile import mark_dynamic
from zgraph.bridge.private_pause import pause_capture, resume_capture
from zgraph.compiler.call_guard import check_moved
from zgraph.runtime import Session
from zgraph.runtime.structure import Structure

Shapes = list[tuple[int, ...]]
"""Of the tensors that a model is called with."""


def agreeing(
    model: nn.Module, forward: Callable[..., Any], session: Session, structure: Structure
) -> Callable[..., Any]:
    """`forward`, before whose first call the ranks agree on the sizes to capture with.

    They do once for each of training and evaluation, with gradients and without. All ranks make these calls together.
    A model that was changed is refused before that.
    """
    met: set[tuple[bool, bool]] = set()

    def call(*args: Any, **kwargs: Any) -> Any:
        mode = (model.training, torch.is_grad_enabled())
        if mode not in met:
            paused = pause_capture()
            try:
                check_moved(session)
                structure.check()
                _agree(mode, (args, kwargs), model, forward, session)
            except BaseException as error:
                session.fail(error)
                raise
            finally:
                resume_capture(paused)
            met.add(mode)
        return forward(*args, **kwargs)

    call.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return call


def _agree(
    mode: tuple[bool, bool], inputs: Any, model: nn.Module, forward: Callable[..., Any], session: Session
) -> None:
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    own = [tuple(t.shape) for t in tensors]
    given = session.peers.exchange_values(f"batch, {'training' if mode[0] else 'evaluation'}, {mode[1]}", own)
    shapes: list[Shapes] = [[tuple(shape) for shape in found] for found in given]
    found = differing(shapes)
    if not found:
        return
    if min(shape[dim] for ranks in shapes for index, dim in found for shape in [ranks[index]]) > 1:
        for index, dim in found:
            mark_dynamic(tensors[index], dim)
        return
    _run_on(widest(shapes), inputs, model, forward, session)


def differing(shapes: list[Shapes]) -> list[tuple[int, int]]:
    """Which dimensions of which tensors have another size on some rank.

    None where the ranks have other tensors, which their programs will tell.

    >>> differing([[(2, 7), (3,)], [(2, 5), (3,)]])
    [(0, 1)]
    """
    if any([len(s) for s in ranks] != [len(s) for s in shapes[0]] for ranks in shapes):
        return []
    return [
        (index, dim)
        for index, shape in enumerate(shapes[0])
        for dim in range(len(shape))
        if len({ranks[index][dim] for ranks in shapes}) > 1
    ]


def widest(shapes: list[Shapes]) -> int:
    """The rank whose smallest size is the largest: torch.compile takes sizes of 0 and 1 for special.

    >>> widest([[(1, 7)], [(2, 5)], [(0, 5)]])
    1
    """
    return max(range(len(shapes)), key=lambda rank: min((d for s in shapes[rank] for d in s), default=0))


def _run_on(rank: int, inputs: Any, model: nn.Module, forward: Callable[..., Any], session: Session) -> None:
    """Run the model on one rank's batch, so that all capture the same; buffers and random numbers are as before."""
    device = session.device
    batch = [pytree.tree_map_only(torch.Tensor, torch.Tensor.cpu, inputs)]
    dist.broadcast_object_list(batch, dist.get_global_rank(session.group, rank), session.group)
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), batch[0])
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        forward(*args, **kwargs)
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
