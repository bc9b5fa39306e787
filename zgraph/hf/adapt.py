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


_INSTALLED = "_output_capturing_hooks_installed"
"""Attribute by which transformers knows that a model has its hooks."""


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
    """Refuse to be wrapped by Accelerate, generate and save with whole parameters."""
    model.__dict__[Unprepared.ATTRIBUTE] = Unprepared()
    if _GENERATES & {base.__name__ for base in type(model).__mro__}:
        own_generate: Any = model.generate
        model.__dict__["generate"] = functools.partial(_generate, model, own_generate)
    if hasattr(model, "save_pretrained"):
        model.__dict__["save_pretrained"] = functools.partial(save_pretrained, model)
    for name in _RESIZES & {*dir(model)}:
        model.__dict__[name] = functools.partial(_refuse, name)


def ready(model: nn.Module) -> bool:
    """Install the hooks by which transformers records hidden states and router logits; whether any was missing.

    transformers installs them in the first call that records, under a lock, which cannot be captured. In calls that do
    not record they only make the capture longer.
    """
    recording = sys.modules.get("transformers.utils.output_capturing")
    install: Callable[[nn.Module], None] | None = getattr(recording, "maybe_install_capturing_hooks", None)
    if install is None:
        return False
    missing = [module for module in model.modules() if _records(module) and not vars(module).get(_INSTALLED)]
    for module in missing:
        install(module)
    return bool(missing)


def _records(module: nn.Module) -> bool:
    return "PreTrainedModel" in {base.__name__ for base in type(module).__mro__}


def _refuse(name: str, *_args: Any, **_kwargs: Any) -> NoReturn:
    raise UsageError(f"call model.{name} before zgraph.compile, which shards the parameters that a model has then")


def _generate(model: nn.Module, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`generate` of transformers: ranks need as many tokens as their rows, and lengths are new all the time."""
    with api.gathered(model):
        return generate(*args, **kwargs)
