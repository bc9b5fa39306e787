"""Gradients of a step that is under way, as a checkpoint keeps them: `gradient.NAME`, laid out as the parameters are.

Gradients that backwards under no_sync left unreduced are averaged for the checkpoint, so that any number of ranks and
any stage can go on with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

from zgraph.bridge import private_runtime
from zgraph.compiler.compiled_model import compiled_model
from zgraph.engine.checkpoint.state import State
from zgraph.engine.checkpoint.tensors import Tensors, like, parameter_names
from zgraph.errors import CheckpointError, UsageError
from zgraph.runtime.gradients import reduced

if TYPE_CHECKING:
    from zgraph.engine.protocol import Trains


def check_between(engine: Trains) -> None:
    """Raise UsageError if the gradients at hand are no part of a checkpoint."""
    if engine.awaits_step:
        raise UsageError(
            "save_checkpoint between backward and step: call engine.step() first, which counts the batch, or "
            "engine.zero_grad() to forget the gradients"
        )


@torch.no_grad()
def gradients_of(engine: Trains) -> Tensors:
    """The gradients so far. All ranks must ask for them."""
    if not engine.pending:
        return {}
    session, names = compiled_model(engine.module).session, parameter_names(engine.module)
    found: Tensors = {}
    for slot in session.store.slots.values():
        own = reduced(session, slot)
        if own is not None:
            parameter = slot.parameter
            laid_out = private_runtime.dtensor_like(own, parameter) if isinstance(parameter, DTensor) else own
            found[f"gradient.{names[id(parameter)]}"] = laid_out
    return found


def gradient_targets(
    engine: Trains, state: State, stored: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> Tensors:
    """Memory for the gradients of a checkpoint.

    Raises:
        CheckpointError: the step was begun in another way than the engine would go on.
    """
    if not state.pending or engine.optimizer is None:
        return {}
    scale = engine.loss_scaler.scale if engine.loss_scaler.is_static else state.loss_scale["scale"]
    if (engine.accumulation, scale) != (state.accumulation, state.loss_scale["scale"]):
        raise CheckpointError(
            f"the checkpoint was saved within a step of {state.accumulation} micro-batches at loss scale "
            f"{state.loss_scale['scale']}, and here it is {engine.accumulation} at {scale}: take the same "
            f"gradient_accumulation_steps and fp16, or load_optimizer_states=False"
        )
    parameters = {f"gradient.{name}": p for name, p in engine.module.named_parameters()}
    return {n: like(parameters[n], *stored[n]) for n in stored if n in parameters}


def take_gradients(engine: Trains, gradients: Tensors) -> None:
    """Go on with these, and forget those that are there."""
    engine.zero_grad()
    for name, parameter in engine.module.named_parameters():
        if (gradient := gradients.get(f"gradient.{name}")) is not None:
            parameter.grad = gradient
