"""Modules, parameters and hooks of a sharded model, to notice that they were changed."""

from __future__ import annotations

from itertools import chain
from operator import is_
from typing import Any

import torch.nn.modules.module as module_of_torch
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from zgraph.errors import UsageError
from zgraph.runtime.shards import ShardStore

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_GLOBAL_HOOKS = tuple(getattr(module_of_torch, f"_global{name}") for name in _HOOKS)


class Structure:
    """The modules of a model, its parameters and its hooks, as they were when it was last looked at.

    Args:
        store: the parameters at rest.
    """

    def __init__(self, store: ShardStore) -> None:
        self.store = store
        self._storages = [
            (s.parameter, s.parameter.untyped_storage()._cdata, s.name)
            for s in store.slots.values()
            if isinstance(s.parameter, DTensor)
        ]
        self._look()

    def _look(self) -> None:
        modules = [*self.store.model.modules()]
        self._held = [held.values() for m in modules for held in (m._modules, m._parameters)]
        self._objects = [*chain.from_iterable(self._held)]
        self._counts = [*map(len, self._held)]
        self._hooks = [*_GLOBAL_HOOKS, *(getattr(m, name) for m in modules for name in _HOOKS)]
        self._count, self._registered = -1, -1
        self._keys: tuple[tuple[int, ...], ...] = ()

    def check(self) -> None:
        """Compare the model with what was sharded.

        Modules without parameters may come and go.

        Raises:
            UsageError: a parameter was added, replaced or taken out, or was given other memory by `p.data = ...`.
        """
        found = chain.from_iterable(self._held)
        if [*map(len, self._held)] != self._counts or not all(map(is_, found, self._objects)):
            self._check_parameters()
            self._look()
        for parameter, storage, name in self._storages:
            if parameter.untyped_storage()._cdata != storage:
                raise UsageError(
                    f"{name}.data was assigned to after zgraph.compile, which changes no shard; copy values in with "
                    f"`with torch.no_grad(): parameter.copy_(...)`, or use model.load_state_dict"
                )

    def _check_parameters(self) -> None:
        known = {id(slot.parameter) for slot in self.store.slots.values()}
        found = {name: p for name, p in self.store.model.named_parameters() if id(p) not in known}
        gone = [
            slot.name
            for slot in self.store.slots.values()
            for owner, key in slot.owners
            if _held(owner, key) is not slot.parameter
        ]
        if not found and not gone:
            return
        replaced = [name for name in found if name in self.store.slots]
        what, names = ("replaced", replaced) if replaced else ("added", [*found]) if found else ("taken out", gone)
        others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise UsageError(
            f"the parameter {names[0]}{others} was {what} after zgraph.compile, which shards what a model has then. "
            "Change the model first (a new head, adapters, tied weights, torch.func.functional_call), then compile it; "
            "new values of the same shape go in with `with torch.no_grad(): parameter.copy_(...)`"
        )

    def has_new_hooks(self) -> bool:
        """Whether the hooks of the modules, or torch's for all modules, are others than at the last question."""
        count = sum(map(len, self._hooks))
        if count == self._count and RemovableHandle.next_id == self._registered:
            return False
        keys = tuple(tuple(hooks) for hooks in self._hooks if hooks)
        is_first, changed = self._count < 0, keys != self._keys
        self._count, self._registered, self._keys = count, RemovableHandle.next_id, keys
        return changed and not is_first


def _held(owner: Any, key: Any) -> Any:
    try:
        return owner[key]
    except (KeyError, IndexError):
        return None
