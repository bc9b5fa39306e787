"""Attributes of a compiled model that transformers, PEFT and Accelerate ask for. None of them need be installed."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from torch import nn

from zgraph import api
from zgraph.errors import UsageError
from zgraph.hf.weights import save_pretrained

_GENERATES = {"GenerationMixin", "PeftModel"}
"""Classes of transformers and PEFT whose `generate` is called from outside; that of others may be part of a forward."""


_RESIZES = {"resize_token_embeddings", "add_adapter", "load_adapter"}
"""Methods of transformers that put other parameters into a model."""


class Unprepared:
    """Value of the attribute by which Accelerate asks a model whether it is prepared, before it wraps it.

    `zgraph.hf.prepare` and the Trainer put True in its place.
    """

    ATTRIBUTE = "_is_accelerate_prepared"

    def __bool__(self) -> bool:
        raise UsageError(
            "Accelerate would wrap a compiled model: call zgraph.hf.prepare(accelerator, model, ...) instead of "
            "accelerator.prepare, or take zgraph.hf.Trainer instead of transformers.Trainer"
        )


def adapt(model: nn.Module) -> None:
    """Refuse to be wrapped by Accelerate, generate and save with whole parameters, and record outputs when captured."""
    _install_recorders(model)
    model.__dict__[Unprepared.ATTRIBUTE] = Unprepared()
    if _GENERATES & {base.__name__ for base in type(model).__mro__}:
        own_generate: Any = model.generate
        model.__dict__["generate"] = functools.partial(_generate, model, own_generate)
    if hasattr(model, "save_pretrained"):
        model.__dict__["save_pretrained"] = functools.partial(save_pretrained, model)
    for name in _RESIZES & {*dir(model)}:
        model.__dict__[name] = functools.partial(_refuse, name)


def _install_recorders(model: nn.Module) -> None:
    """The hooks by which transformers records hidden states and router logits: it installs them in a first call, under
    a lock, which cannot be captured.
    """
    recording = sys.modules.get("transformers.utils.output_capturing")
    install: Callable[[nn.Module], None] | None = getattr(recording, "maybe_install_capturing_hooks", None)
    for module in model.modules() if install is not None else ():
        if install is not None and "PreTrainedModel" in {base.__name__ for base in type(module).__mro__}:
            install(module)


def _refuse(name: str, *_args: Any, **_kwargs: Any) -> NoReturn:
    raise UsageError(f"call model.{name} before zgraph.compile, which shards the parameters that a model has then")


def _generate(model: nn.Module, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`generate` of transformers: ranks need as many tokens as their rows, and lengths are new all the time."""
    with api.gathered(model):
        return generate(*args, **kwargs)
