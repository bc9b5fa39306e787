"""Models built on the meta device: one module at a time gets memory and its first values, then is sharded."""

from __future__ import annotations

import torch
from torch import nn

from zgraph.errors import UsageError


def materialise(model: nn.Module, name: str, device: torch.device) -> nn.Parameter:
    """Give the module that holds the parameter `name` memory on `device` and its initial values.

    Values come from the module's `reset_parameters`, or from the model's `_init_weights` (Hugging Face).

    Raises:
        UsageError: the module has neither.
    """
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    if module._parameters[key].is_meta:  # type: ignore[union-attr]
        initialise(model, path, module, device)
    parameter = module._parameters[key]
    assert parameter is not None
    return parameter


def materialise_buffers(model: nn.Module, device: torch.device) -> None:
    """The same for modules that have buffers on the meta device but no parameters there any more."""
    for path, module in model.named_modules():
        if any(b is not None and b.is_meta for b in module._buffers.values()):
            initialise(model, path, module, device)


def initialise(model: nn.Module, path: str, module: nn.Module, device: torch.device) -> None:
    """Memory and initial values for one module's own parameters and buffers."""
    reset = getattr(module, "reset_parameters", None)
    whole_model = getattr(model, "_init_weights", None)
    if reset is None and whole_model is None:
        raise UsageError(
            f"{path or 'the model'} ({type(module).__name__}) is on the meta device and does not say how it is "
            "initialised; give it a reset_parameters method, or build the model on a real device"
        )
    module.to_empty(device=device, recurse=False)
    with torch.no_grad():
        if whole_model is not None:
            whole_model(module)
        elif reset is not None:
            reset()
