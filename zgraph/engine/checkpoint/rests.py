"""Rests of the codes of gradients, as a checkpoint keeps them: `feedback.NAME`, laid out as the parameters are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from zgraph.compiler.compiled_model import compiled_model
from zgraph.engine.checkpoint.tensors import Tensors, like
from zgraph.errors import CheckpointError
from zgraph.passes.compress import Compress
from zgraph.runtime.feedback import FeedbackState

if TYPE_CHECKING:
    from zgraph.engine.protocol import Trains

_PREFIX = "feedback."


def rests_of(engine: Trains) -> Tensors:
    """Rests that are due to each parameter's gradient; none if nothing was coded. All ranks must ask for it."""
    feedback = compiled_model(engine.module).session.feedback
    if not feedback.num_bytes:
        return {}
    return {f"{_PREFIX}{name}": due for name, due in FeedbackState(feedback).state_dict().items()}


def rest_targets(engine: Trains, stored: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> Tensors:
    """Memory for the rests of a checkpoint; none where the model codes no gradients.

    Raises:
        CheckpointError: a rest has not its parameter's shape.
    """
    model = compiled_model(engine.module)
    if not any(isinstance(step, Compress) for step in model.pipeline.passes):
        return {}
    found: Tensors = {}
    for name, slot in model.session.store.slots.items():
        if (key := f"{_PREFIX}{name}") not in stored:
            continue
        dtype, shape = stored[key]
        if shape != tuple(slot.placeholder.shape):
            raise CheckpointError(
                f"{key} has shape {shape}, and the parameter {tuple(slot.placeholder.shape)}; nothing was loaded"
            )
        found[key] = like(slot.parameter, dtype, shape)
    return found


def take_rests(engine: Trains, rests: Tensors) -> None:
    """Go on from them. Without any, codes begin with nothing left out."""
    feedback = compiled_model(engine.module).session.feedback
    feedback.clear()
    if rests:
        due = {name.removeprefix(_PREFIX): rest for name, rest in rests.items()}
        trained = {n for n, s in feedback.session.store.slots.items() if s.placeholder.requires_grad}
        absent = {n: torch.zeros(feedback.session.store.slots[n].placeholder.shape) for n in trained - due.keys()}
        FeedbackState(feedback).load_state_dict(due | absent)
