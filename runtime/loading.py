"""Loading a state dict into a sharded model: all of it is checked before any of it is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from zgraph.bridge import private_dtensor, private_runtime
from zgraph.errors import StateDictError, nearest
from zgraph.runtime.foreign_shards import REMEDY, foreign
from zgraph.runtime.shards import ShardStore


def checked_loading(model: nn.Module, store: ShardStore, forget: Callable[[], None]) -> Callable[..., Any]:
    """The model's `load_state_dict`, which refuses what does not fit before anything is loaded.

    Args:
        model: of the shards.
        store: the shards.
        forget: what was gathered of them is no more of use.
    """
    load = model.load_state_dict

    def load_state_dict(state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        check_state_dict(model, state_dict, strict=strict, assign=assign)
        store.copies.settle()
        forget()
        return load(state_dict, strict=strict)

    return load_state_dict


def check_state_dict(model: nn.Module, state: Mapping[str, Any], *, strict: bool, assign: bool) -> None:
    """Compare a state dict with the model.

    Raises:
        StateDictError: with every entry that is misshapen and, if `strict`, missing or unexpected.
    """
    wanted = {name: t for name, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    given = [name for name in state if isinstance(state[name], torch.Tensor)]
    problems = [
        f"{name} has shape {tuple(state[name].shape)}, not {tuple(wanted[name].shape)}"
        for name in given
        if name in wanted and state[name].shape != wanted[name].shape
    ]
    problems += [f"{name} is {w}. {REMEDY}" for name in given if (w := foreign(state[name], wanted.get(name)))][:1]
    if strict:
        problems += [f"{name} is missing" + _near(name, given) for name in wanted if name not in state]
        problems += [f"{name} is not part of the model" for name in given if name not in wanted]
    if assign:
        problems.append("assign=True would replace the shards; load with assign=False")
    if problems:
        shown = "\n  ".join(problems[:20]) + ("\n  ..." if len(problems) > 20 else "")
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        raise StateDictError(f"the state dict does not fit; nothing was loaded. {count}:\n  {shown}")


def place_state_dict(module: nn.Module, state: MutableMapping[str, Any], prefix: str, *_: Any) -> None:
    """A pre-hook of `load_state_dict`: whole tensors become shards where shards are held."""
    for name, tensor in module.state_dict(prefix=prefix).items():
        given = state.get(name)
        if isinstance(tensor, DTensor) and isinstance(given, torch.Tensor) and not isinstance(given, DTensor):
            state[name] = _like(tensor, given)


def _like(held: DTensor, whole: torch.Tensor) -> DTensor:
    """A whole tensor placed as `held` is."""
    return private_runtime.dtensor_like(private_dtensor.placed_as(whole.to(held._local_tensor.device), held), held)


def _near(name: str, given: list[str]) -> str:
    near = nearest(name, given)
    return f" (the state dict has {near[0]})" if near else ""
