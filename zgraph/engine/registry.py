"""The engines of this process, by their parameters: what DeepSpeed asks a parameter, an engine answers here."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, NamedTuple

import torch

from zgraph.compiler.compiled_model import compiled_model
from zgraph.errors import UsageError
from zgraph.runtime import Session
from zgraph.runtime.shards import Slot

if TYPE_CHECKING:
    from zgraph.engine.protocol import Trains

_ENGINES: weakref.WeakSet[Trains] = weakref.WeakSet()


class Home(NamedTuple):
    """Where a parameter is: its engine, what that runs on, and its memory there."""

    engine: Trains
    session: Session
    slot: Slot


def register(engine: Trains) -> None:
    """Have an engine found by its parameters, for as long as it lives."""
    _ENGINES.add(engine)


def home_of(parameter: torch.Tensor) -> Home:
    """The home of a parameter.

    Raises:
        UsageError: it is no parameter of an engine that lives.
    """
    for engine in _ENGINES:
        session = compiled_model(engine.module).session
        for slot in session.store.slots.values():
            if slot.parameter is parameter:
                return Home(engine, session, slot)
    raise UsageError("this is no parameter of an engine: take one of engine.module.named_parameters()")
