"""Every place of a model that holds a parameter."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn

Owner = tuple[Any, Any]
"""A container that holds a parameter, and the key or position there."""


def every_owner(model: nn.Module) -> dict[str, tuple[nn.Parameter, list[Owner]]]:
    """Every parameter under its first name, with every place that holds it.

    Tied weights have several. Recurrent layers and some modules of users keep parameters in an attribute or a list too;
    recurrent layers also keep weak references, by which they see that their weights are others.
    """
    found: dict[int, tuple[str, nn.Parameter, list[Owner]]] = {}
    for prefix, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{prefix}.{key}" if prefix else key
                found.setdefault(id(parameter), (name, parameter, []))[2].append((module._parameters, key))
    for module in model.modules():
        for owner, key, held in _attributes(module):
            if id(held) in found:
                found[id(held)][2].append((owner, key))
    return {name: (parameter, owners) for name, parameter, owners in found.values()}


def _attributes(module: nn.Module) -> Iterator[tuple[Any, Any, Any]]:
    """The owner, key and value of each attribute of a module, and of each entry of its lists and dictionaries."""
    for name, value in module.__dict__.items():
        if name in ("_parameters", "_buffers", "_modules"):
            continue
        if isinstance(value, list | dict):
            for key, held in value.items() if isinstance(value, dict) else enumerate(value):
                if isinstance(held, weakref.ref):
                    yield _Weakly(value), key, held()
                else:
                    yield value, key, held
        else:
            yield module.__dict__, name, value


class _Weakly:
    """A container of weak references, seen as one of what they refer to."""

    def __init__(self, references: Any) -> None:
        self.references = references

    def __getitem__(self, key: Any) -> Any:
        return self.references[key]()

    def __setitem__(self, key: Any, held: Any) -> None:
        self.references[key] = weakref.ref(held)
