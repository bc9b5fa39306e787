"""Compiled models beside Hugging Face's Accelerate, which would wrap them."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from zgraph.api import no_sync
from zgraph.compiler.compiled_model import compiled_model
from zgraph.errors import UsageError
from zgraph.hf.adapt import Unprepared


def prepare(accelerator: Any, model: nn.Module, *others: Any) -> Any:
    """`accelerator.prepare` with a compiled model: it is not wrapped, and averages its gradients itself.

    `accelerator.accumulate`, `no_sync`, `backward` and `clip_grad_norm_` then do what they do otherwise.

    Args:
        accelerator: an Accelerator.
        model: compiled by `zgraph.compile`.
        others: optimizers (made after compiling), loaders and schedulers.

    Returns:
        The model and what `accelerator.prepare` made of the others.

    Raises:
        UsageError: the model is not compiled, or the accelerator would do what zgraph does.
    """
    compiled_model(model)
    if accelerator.mixed_precision != "no":
        raise UsageError(
            f"mixed_precision={accelerator.mixed_precision!r}: the compiled model computes in zgraph.compile's "
            'param_dtype; give param_dtype=torch.bfloat16 there, and leave mixed_precision at "no"'
        )
    if (kind := accelerator.distributed_type.value) in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        raise UsageError(f"the accelerator is {kind}'s, which shards the model itself: launch without it")
    accelerator.register_save_state_pre_hook(refuse_saving)
    return accelerator.prepare(own(model), *others)


def own(model: nn.Module) -> nn.Module:
    """Have Accelerate and `transformers` take a compiled model as it is."""
    attributes = model.__dict__
    attributes[Unprepared.ATTRIBUTE] = True
    attributes["no_sync"] = functools.partial(no_sync, model)
    return model


def refuse_saving(*_: Any) -> None:
    """Raise UsageError in the place of `accelerator.save_state`."""
    raise UsageError(
        "accelerator.save_state would keep the first rank's shards of the optimizer only; write them with "
        "torch.distributed.checkpoint or zgraph.hf.state.save_state, and the model with model.save_pretrained"
    )
