"""Shards that another rank saved: a DTensor keeps, in a file too, whose rows of which mesh it holds.

Loaded on this rank, they would take the place of its own rows without a word.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer

from zgraph.errors import StateDictError

REMEDY = (
    "Load the file that this rank wrote, on as many ranks; or save whole tensors (call .full_tensor() on every rank), "
    "or take torch.distributed.checkpoint, which any number of ranks reads"
)


def foreign(given: Any, held: Any) -> str:
    """Whose shard a loaded tensor is, in words, if not this rank's; else empty.

    Args:
        given: loaded.
        held: what it is loaded into.
    """
    if not isinstance(given, DTensor) or _is_whole(given):
        return ""
    if not isinstance(held, DTensor):
        return f"a shard of {given.device_mesh.size()} ranks, of which all are needed"
    theirs, ours = given.device_mesh, held.device_mesh
    if theirs.shape != ours.shape:
        return f"a shard on a mesh of {_sizes(theirs.shape)}, not {_sizes(ours.shape)}"
    there, here = theirs.get_coordinate(), ours.get_coordinate()
    if there is None or here is None or [*there] == [*here]:
        return ""
    return f"the shard of rank {int(theirs.mesh[tuple(there)])}, not of rank {int(ours.mesh[tuple(here)])}"


def refuse_shards() -> None:
    """Have models that are not compiled refuse a state dict of shards, before anything is loaded.

    torch copies one parameter after the other, and says of each that a tensor met a DTensor.
    """
    load = nn.Module.load_state_dict

    @functools.wraps(load)
    def load_state_dict(self: nn.Module, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        assigns = kwargs.get("assign", len(args) > 1 and args[1])
        if isinstance(state_dict, Mapping) and not assigns:
            _check_whole(self, state_dict)
        return load(self, state_dict, *args, **kwargs)

    nn.Module.load_state_dict = load_state_dict  # type: ignore[method-assign]


def _check_whole(model: nn.Module, state: Mapping[str, Any]) -> None:
    sharded = [name for name, t in state.items() if isinstance(t, DTensor) and not _is_whole(t)]
    if not sharded:
        return
    plain = {n for n, t in model.named_parameters(remove_duplicate=False) if not isinstance(t, DTensor)}
    if wrong := [name for name in sharded if name in plain]:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise StateDictError(
            f"{wrong[0]}{more} of the state dict is this or another rank's shard, and this {type(model).__name__} is "
            "not compiled and needs whole tensors; nothing was loaded. Save whole tensors: `{n: t.full_tensor() for n, "
            "t in model.state_dict().items()}` on every rank, or get_model_state_dict with full_state_dict=True"
        )


_checked: WeakKeyDictionary[Optimizer, Any] = WeakKeyDictionary()


def check_states(optimizer: Optimizer) -> None:
    """Look through an optimizer's states once they have been loaded.

    Raises:
        StateDictError: a state is another rank's. No parameter was changed.
    """
    if _checked.get(optimizer) is optimizer.state:
        return
    for key, whose in _foreign_states(optimizer):
        raise StateDictError(f"{key} of the optimizer's state is {whose}. {REMEDY}")
    _checked[optimizer] = optimizer.state


def _foreign_states(optimizer: Optimizer) -> Iterator[tuple[str, str]]:
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(parameter, DTensor) and (whose := foreign(value, parameter)):
                yield str(key), whose


def _is_whole(tensor: DTensor) -> bool:
    return all(placement.is_replicate() for placement in tensor.placements)


def _sizes(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) + " ranks"
