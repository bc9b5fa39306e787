"""Shards that another rank saved: a DTensor keeps, in a file too, whose rows of which mesh it holds.

Loaded on this rank, they would take the place of its own rows without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

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
    if not isinstance(given, DTensor) or all(placement.is_replicate() for placement in given.placements):
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


def _sizes(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) + " ranks"
