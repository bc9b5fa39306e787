"""Copies of a compiled model: `copy.deepcopy` gives another compiled model with shards of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from zgraph.bridge.private_runtime import dtensor_like
from zgraph.errors import UsageError
from zgraph.runtime import Session

_NONE = object()


class Copier:
    """Copies a compiled model.

    Args:
        model: before anything is attached to it.
        again: compiles a copy as the model was compiled.
    """

    def __init__(self, model: nn.Module, again: Callable[[nn.Module], Session]) -> None:
        self.model, self.again = model, again
        self._before = dict(model.__dict__)
        self._attached: list[str] = []
        self.handles: list[RemovableHandle] = []

    def attach(self, session: Session) -> None:
        """Have `copy.deepcopy(model)` come here, and refuse pickle. Call it when all else is attached."""
        own = self.model.__dict__
        own["__deepcopy__"] = lambda memo: self._copied(session, memo)
        own["__reduce_ex__"] = _refuse
        self.handles += [
            module._register_state_dict_hook(_savable)  # type: ignore[no-untyped-call]
            for module in self.model.modules()
            if any(isinstance(p, DTensor) for p in module._parameters.values())
        ]
        self._attached = [key for key, value in own.items() if self._before.get(key, _NONE) is not value]

    def plain(self, session: Session) -> nn.Module:
        """A model as it was before it was compiled, with whole parameters that hold no values yet."""
        memo: dict[int, Any] = {}
        for slot in session.store.slots.values():
            like = slot.placeholder
            whole = torch.empty(slot.parameter.shape, dtype=like.dtype, device=session.device)
            memo[id(slot.parameter)] = nn.Parameter(whole, requires_grad=False)
        return self._bare(memo)

    def _bare(self, memo: dict[int, Any]) -> nn.Module:
        made = type(self.model).__new__(type(self.model))
        memo[id(self.model)] = made
        with self._detached():
            made.__dict__.update(copy.deepcopy(self.model.__dict__, memo))
        return made

    def _copied(self, session: Session, memo: dict[int, Any]) -> nn.Module:
        """Another model with the same values, compiled. All ranks copy together."""
        for slot in session.store.slots.values():
            memo[id(slot.parameter)] = _blank(slot.parameter, like=slot.placeholder)
        made = self._bare(memo)
        copied = self.again(made)
        with torch.no_grad():
            for name, slot in session.store.slots.items():
                copied.store.slots[name].rest.copy_(slot.rest)
        return made

    @contextmanager
    def _detached(self) -> Iterator[None]:
        """The model as it was before it was compiled, but for its parameters."""
        own = self.model.__dict__
        present = {key: own[key] for key in self._attached if key in own}
        hooks = [(held, handle.id) for handle in self.handles if (held := handle.hooks_dict_ref()) is not None]
        taken = [(held, number, held[number]) for held, number in hooks if number in held]
        try:
            for held, number, _ in taken:
                del held[number]
            for key in present:
                del own[key]
                if key in self._before:
                    own[key] = self._before[key]
            yield
        finally:
            own.update(present)
            for held, number, hook in taken:
                held[number] = hook


def _blank(parameter: torch.Tensor, like: nn.Parameter) -> nn.Parameter:
    """A whole parameter to be sharded: without memory, if its shard is all that is kept of it."""
    if isinstance(parameter, DTensor) and parameter.placements[-1].is_shard():
        whole = torch.zeros((), dtype=parameter.dtype, device=like.device).expand(parameter.shape)
    else:
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=like.device)
    return nn.Parameter(whole, parameter.requires_grad)


def _savable(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Hook of a module's state dict: DTensors that torch.save, pickle and deepcopy take. Those that torch makes of a
    shard in a flat buffer have the shard's offset for theirs.
    """
    for key in module._parameters:
        entry = state.get(prefix + key)
        if isinstance(entry, DTensor) and not isinstance(entry, nn.Parameter):
            state[prefix + key] = dtensor_like(entry._local_tensor, entry)


def _refuse(_protocol: Any) -> NoReturn:
    raise UsageError(
        "a compiled model cannot be pickled: its shards belong to this job's ranks. Save model.state_dict() instead, "
        "by torch.save as one file a rank or by torch.distributed.checkpoint; engine.save_checkpoint and "
        "zgraph.export_hf write whole weights. For another compiled model take copy.deepcopy(model), not copy.copy"
    )


def refuse_sharing() -> NoReturn:
    """Stand in for `model.share_memory`, which ends the process where parameters are DTensors.

    Raises:
        UsageError: always.
    """
    raise UsageError("call model.share_memory() before zgraph.compile: memory of shards is this process's own")
