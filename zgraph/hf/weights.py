"""Whole weights of a compiled model, as transformers saves them."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from zgraph.bridge import private_runtime
from zgraph.compiler.compiled_model import compiled_model


def whole_state_dict(model: nn.Module, *, keep: bool) -> dict[str, torch.Tensor]:
    """The model's weights, whole and on the CPU: gathered one at a time, by all ranks together.

    Args:
        model: compiled.
        keep: False on ranks that only help to gather.
    """
    tied = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    gathered: dict[int, torch.Tensor] = {}
    found = {}
    for name, tensor in model.state_dict().items():
        known = tied.get(name, id(tensor))
        if known not in gathered:
            whole = _whole(tensor)
            gathered[known] = whole.cpu() if keep else whole.new_empty(0)
        found[name] = gathered[known]
    return found if keep else {}


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    kind = tensor.device_mesh.device_type
    if tensor.to_local().device.type != kind:  # it rests on the host
        tensor = private_runtime.dtensor_like(tensor.to_local().to(kind), tensor)
    return tensor.full_tensor()


def save_pretrained(model: nn.Module, save_directory: str | os.PathLike[str], **options: Any) -> None:
    """`save_pretrained` of transformers: all ranks gather the weights, the first writes them.

    Raises:
        PeerError: another rank does not call it.
    """
    session = compiled_model(model).session
    is_first = options.pop("is_main_process", session.store.rank == 0)
    state = options.pop("state_dict", None)
    if state is None:
        if not session.is_alone:
            session.begin_call()
            session.peers.agree("saving of the weights: save_pretrained is for all ranks to call", "")
        state = whole_state_dict(model, keep=is_first)
    if is_first:
        type(model).save_pretrained(model, save_directory, state_dict=state, **options)  # type: ignore[attr-defined]
