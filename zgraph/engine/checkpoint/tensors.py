"""The tensors of a model by name: as they are at rest, copied, filled, or whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from zgraph.bridge import private_runtime
from zgraph.errors import CheckpointError
from zgraph.optim.runs import first_row, local

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


def copied(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """The tensors as they are now, on the host."""
    return {name: _with_local(tensor, lambda own: own.to("cpu", copy=True)) for name, tensor in tensors.items()}


def like(parameter: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Memory for what belongs to a parameter: placed as it is if as large; on the host if it is one number."""
    if tuple(parameter.shape) == shape and shape:
        return torch.zeros_like(parameter, dtype=dtype)
    return torch.zeros(shape, dtype=dtype, device=local(parameter).device if shape else "cpu")


@torch.no_grad()
def fill(target: torch.Tensor, whole: torch.Tensor) -> None:
    """Copy a whole tensor, or this rank's part of it, to where it belongs."""
    held = local(target)
    if isinstance(target, DTensor) and isinstance(target.placements[-1], Shard):
        start = first_row(target)
        whole = whole[start : start + held.shape[0]]
    held.copy_(whole)


def whole(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """All of a tensor, on the host; every rank must ask for it."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().to("cpu", dtype)
    device = tensor.device_mesh.device_type
    return _with_local(tensor, lambda own: own.to(device, dtype)).full_tensor().cpu()  # type: ignore[attr-defined,no-any-return]


def _with_local(tensor: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    own = change(local(tensor).detach())
    return private_runtime.dtensor_like(own, tensor) if isinstance(tensor, DTensor) else own
