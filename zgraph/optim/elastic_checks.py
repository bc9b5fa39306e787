"""Conditions of replicas that train together: what they have alike, and whose gradients are averaged."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from zgraph.errors import UsageError
from zgraph.optim.runs import local


def check_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse parameters that replicas would not share. Raises UsageError."""
    own = {id(p) for p in model.parameters()}
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        if id(parameter) not in own:
            raise UsageError(
                f"the optimizer has a parameter of shape {tuple(parameter.shape)} that is not the model's: make it a "
                "part of the model, so that replicas share it"
            )
        if parameter.is_complex():
            raise UsageError("the mean over replicas is of real numbers: make complex parameters pairs of real ones")


def check_gradients(optimizer: torch.optim.Optimizer, known: Collection[int]) -> None:
    """Refuse gradients that the mean over replicas would leave out. Raises UsageError.

    Args:
        optimizer: of the parameters.
        known: the `id` of each parameter of which the mean is taken.
    """
    for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
        if id(parameter) not in known:
            raise UsageError(
                f"a parameter of shape {tuple(parameter.shape)} has a gradient and was frozen, or not there, when "
                "zgraph.elastic was called: freeze and unfreeze before"
            )
        if parameter.grad.is_sparse:
            raise UsageError("gradients of elastic replicas are dense: make embeddings with sparse=False")


def digest(
    model: nn.Module, optimizer: torch.optim.Optimizer, num_shards: int, broadcast_buffers: bool, buffer_bytes: int
) -> str:
    """Text of what replicas must have alike.

    Args:
        model: that is trained.
        optimizer: of its parameters.
        num_shards: ranks of a replica.
        broadcast_buffers: whether all take over the buffers of the first.
        buffer_bytes: of those that are taken over, on this rank.
    """
    parameters = [
        f"{name} {tuple(p.shape)}, of which {tuple(local(p).shape)} in {p.dtype}{'' if p.requires_grad else ', frozen'}"
        for name, p in model.named_parameters()
    ]
    buffers = [f"{name} {tuple(b.shape)} in {b.dtype}" for name, b in model.named_buffers()]
    groups = [f"{len(group['params'])} parameters of a group" for group in optimizer.param_groups]
    taken = f"broadcast_buffers={broadcast_buffers} ({buffer_bytes} bytes)"
    return "\n".join([f"{num_shards} ranks", *parameters, *buffers, taken, type(optimizer).__name__, *groups])
