"""Hooks by which transformers and PEFT make checkpointed activations want gradients, which no graph needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def drop_gradient_hooks(model: nn.Module) -> None:
    """Remove forward hooks that do nothing but `output.requires_grad_(True)`.

    Reentrant checkpoints need an input with a gradient where all weights before them are frozen. In a captured graph a
    checkpointed region needs none, and torch.compile refuses to turn gradients on.
    """
    for module in model.modules():
        for key in [key for key, hook in module._forward_hooks.items() if _turns_gradients_on(hook)]:
            del module._forward_hooks[key]


@contextmanager
def without_gradient_hooks(model: nn.Module) -> Iterator[None]:
    """The model without these hooks, for the length of a `with`."""
    before = [(module._forward_hooks, module._forward_hooks.copy()) for module in model.modules()]
    drop_gradient_hooks(model)
    try:
        yield
    finally:
        for hooks, kept in before:
            hooks.clear()
            hooks.update(kept)


def _turns_gradients_on(hook: Callable[..., Any]) -> bool:
    code = getattr(hook, "__code__", None)
    return code is not None and all(getattr(code, part) == getattr(_turning.__code__, part) for part in _CODE)


def _turning(module: Any, inputs: Any, output: Any) -> None:
    output.requires_grad_(True)


_CODE = ("co_code", "co_names", "co_consts")
"""Attributes of the code that two functions share if they do the same, whatever they and their arguments are called."""
