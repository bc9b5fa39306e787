"""Models built on the meta device: one module at a time gets memory and its first values, then is sharded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from zgraph.errors import UsageError


def check_initialisable(model: nn.Module) -> None:
    """Check, before anything is changed, that every module on the meta device can be initialised.

    Raises:
        UsageError: one has neither `reset_parameters` nor a model with `_init_weights`.
    """
    for path, module in model.named_modules():
        tensors = [*module._parameters.values(), *module._buffers.values()]
        if any(t is not None and t.is_meta for t in tensors) and not _initialisers(model, module):
            raise UsageError(
                f"{path or 'the model'} ({type(module).__name__}) is on the meta device and does not say how it is "
                "initialised; give it a reset_parameters method, or build the model on a real device"
            )


def materialise(model: nn.Module, name: str, device: torch.device) -> nn.Parameter:
    """Give the module that holds the parameter `name` memory on `device` and its initial values.

    Values come from the model's `_init_weights` (Hugging Face), or else from the module's `reset_parameters`.
    """
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    if module._parameters[key].is_meta:  # type: ignore[union-attr]
        initialise(model, module, device)
    parameter = module._parameters[key]
    assert parameter is not None
    return parameter


def materialise_buffers(model: nn.Module, device: torch.device) -> None:
    """The same for modules that have buffers on the meta device but no parameters there any more."""
    for module in model.modules():
        if any(b is not None and b.is_meta for b in module._buffers.values()):
            initialise(model, module, device)


def initialise(model: nn.Module, module: nn.Module, device: torch.device) -> None:
    """Memory and initial values for one module's own parameters and buffers."""
    first, *_ = _initialisers(model, module)
    module.to_empty(device=device, recurse=False)
    with torch.no_grad():
        first()


def _initialisers(model: nn.Module, module: nn.Module) -> list[Callable[[], None]]:
    """The ways to give a module its initial values, the preferred one first."""
    by_model = getattr(model, "_init_weights", None)
    by_itself = getattr(module, "reset_parameters", None)
    return [*([partial(by_model, module)] if by_model else []), *([by_itself] if by_itself else [])]
