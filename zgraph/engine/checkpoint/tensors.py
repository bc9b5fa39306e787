"""The tensors of a model by name: as they are at rest, copied, filled, or whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from zgraph.bridge import private_runtime
from zgraph.errors import CheckpointError
from zgraph.optim.runs import first_row, local
from zgraph.runtime.shards import settle_host_memory

Tensors = dict[str, torch.Tensor]


def model_tensors(module: nn.Module) -> Tensors:
    """Parameters and persistent buffers at rest by name; one that has several names under its first."""
    found: Tensors = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{name} in the model's state dict is no tensor: make it a buffer, or client_state")
        if id(tensor) not in seen:
            found[name] = tensor
            seen.add(id(tensor))
    return found


def parameter_names(module: nn.Module) -> dict[int, str]:
    """The name of each parameter, by its id."""
    return {id(tensor): name for name, tensor in model_tensors(module).items() if isinstance(tensor, nn.Parameter)}


COUNTS = frozenset({"step", "mu_product", "eta", "mu"})
"""States of torch's optimizers that are one number for a parameter, whatever its shape."""


def like(parameter: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], key: str = "") -> torch.Tensor:
    """Memory for what belongs to a parameter: placed as it is if of its shape; a number of its own is on the host.

    Args:
        key: of an optimizer's state; a parameter without dimensions has moments of the same shape as its step.
    """
    if tuple(parameter.shape) == shape and key not in COUNTS:
        return torch.zeros_like(parameter, dtype=dtype)
    return torch.zeros(shape, dtype=dtype, device=local(parameter).device if shape else "cpu")


@torch.no_grad()
def fill(target: torch.Tensor, whole: torch.Tensor) -> None:
    """Copy a whole tensor, or this rank's part of it, to where it belongs."""
    settle_host_memory()
    local(target).copy_(part_of(whole, target))


def part_of(whole: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """This rank's part of a whole tensor, by how a target is laid out."""
    if not isinstance(target, DTensor) or not isinstance(target.placements[-1], Shard):
        return whole
    start = first_row(target)
    return whole[start : start + local(target).shape[0]]


def gathered(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """All of a tensor, where the model computes; every rank must ask for it. It may be the tensor's own memory."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().to(dtype=dtype)
    device = tensor.device_mesh.device_type
    return _with_local(tensor, lambda own: own.to(device, dtype)).full_tensor()  # type: ignore[attr-defined,no-any-return]


def whole(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """All of a tensor, on the host; every rank must ask for it."""
    return gathered(tensor, dtype).cpu()


def whole_state_dict(model: nn.Module, *, keep: bool) -> dict[str, torch.Tensor]:
    """The model's weights, whole and on the CPU: gathered one at a time, by all ranks together.

    Args:
        model: compiled.
        keep: False on ranks that only help to gather.
    """
    tied = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    known: dict[int, torch.Tensor] = {}
    found = {}
    for name, tensor in model.state_dict().items():
        key = tied.get(name, id(tensor))
        if key not in known:
            whole = gathered(tensor)
            known[key] = whole.cpu() if keep else whole.new_empty(0)
        found[name] = known[key]
    return found if keep else {}


def _with_local(tensor: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    own = change(local(tensor).detach())
    return private_runtime.dtensor_like(own, tensor) if isinstance(tensor, DTensor) else own
