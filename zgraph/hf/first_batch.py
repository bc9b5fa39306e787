"""Ranks that begin with batches of other sizes: a graph is first captured from one batch on all, to be compared."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils import _pytree as pytree

from zgraph.compiler.compiled_model import compiled_model


def align_first_batch(model: nn.Module) -> None:
    """Have a compiled model run on the first rank's batch, before ranks first call it with batches of other sizes.

    That is so once for training and once for evaluation; later, each rank may meet other sizes alone. All ranks have to
    make these calls together.
    """
    session = compiled_model(model).session
    if session.num_ranks == 1:
        return
    forward = model.__dict__["forward"]
    met: set[tuple[bool, bool]] = set()

    def call(*args: Any, **kwargs: Any) -> Any:
        mode = (model.training, torch.is_grad_enabled())
        if mode not in met:
            met.add(mode)
            if (first := _first_batch((args, kwargs), session.group, session.device)) is not None:
                buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
                with torch.random.fork_rng([session.device] if session.device.type == "cuda" else []):
                    forward(*first[0], **first[1])
                for buffer, before in buffers:
                    buffer.copy_(before)
        return forward(*args, **kwargs)

    call.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    model.__dict__["forward"] = call


def _first_batch(inputs: Any, group: dist.ProcessGroup, device: torch.device) -> Any:
    """Inputs with which the first rank calls the model; None where all ranks' inputs have the same sizes."""
    own = [leaf.shape for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    shapes: list[Any] = [None] * group.size()
    dist.all_gather_object(shapes, own, group)
    if all(found == shapes[0] for found in shapes):
        return None
    batch = [pytree.tree_map_only(torch.Tensor, torch.Tensor.cpu, inputs)]
    dist.broadcast_object_list(batch, dist.get_global_rank(group, 0), group)
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), batch[0])
