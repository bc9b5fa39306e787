"""The objects that a function returns, made anew around other tensors: by the classes of what it returned once."""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Callable, Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch

Step = Callable[[list[Any], Sequence[Any]], Any]
"""Makes one object of those that are made already, and of the tensors."""

_AS_THEY_ARE = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type,
    enum.Enum,
    FunctionType,
    BuiltinFunctionType,
    torch.dtype,
    torch.device,
    torch.Size,
)


class NoTemplate(TypeError):
    """An object is of a kind that cannot be made anew. The message says which, and where it is."""


class Template:
    """Objects that a function returned, with places for tensors.

    Args:
        found: what it returned.
        is_kept: whether an object is one from before the call, which results refer to as it is.

    `tensors` are those in it, each once, in the order in which they come. `text` says how it is made up.

    Raises NoTemplate for an object of a kind that cannot be made anew.
    """

    def __init__(self, found: Any, is_kept: Callable[[Any], bool]) -> None:
        self.tensors: list[torch.Tensor] = []
        self._is_kept = is_kept
        self._numbers: dict[int, int] = {}
        self._steps: list[Step] = []
        self._words: list[str] = []
        self._open: set[int] = set()
        self._last = self._add(found, "the result")

    @property
    def text(self) -> str:
        return "\n".join(self._words)

    def filled(self, tensors: Sequence[Any]) -> Any:
        """The objects, with these in the places of `tensors`."""
        made: list[Any] = []
        for step in self._steps:
            made.append(step(made, tensors))
        return made[self._last]

    def _add(self, found: Any, place: str) -> int:
        """Number of an object, which is known by now."""
        if id(found) in self._numbers:
            return self._numbers[id(found)]
        if id(found) in self._open:
            raise NoTemplate(f"{place} contains itself")
        self._open.add(id(found))
        step, word = self._made(found, place)
        self._open.discard(id(found))
        self._steps.append(step)
        self._words.append(word)
        self._numbers[id(found)] = len(self._steps) - 1
        return len(self._steps) - 1

    def _made(self, found: Any, place: str) -> tuple[Step, str]:
        kind = type(found)
        name = f"{kind.__module__}.{kind.__qualname__}"
        if isinstance(found, torch.Tensor):
            index = len(self.tensors)
            self.tensors.append(found)
            return (lambda made, tensors: tensors[index]), f"tensor {index}"
        if isinstance(found, _AS_THEY_ARE) or self._is_kept(found):
            return (lambda made, tensors: found), f"{name} {_word(found)}"
        if isinstance(found, list | tuple):
            return self._sequence(found, place, name)
        if isinstance(found, dict):
            return self._dictionary(found, place, name)
        own = getattr(found, "__dict__", None)
        if (
            not isinstance(own, dict)
            or isinstance(found, torch.nn.Module)
            or getattr(kind, "__reduce_ex__", None) is not object.__reduce_ex__
        ):
            raise NoTemplate(f"{place} is a {name}")
        attributes = self._items(own, place)

        def make(made: list[Any], tensors: Sequence[Any]) -> Any:
            new = object.__new__(kind)
            new.__dict__.update({key: made[number] for key, number in attributes})
            return new

        return make, f"{name} {attributes}"

    def _items(self, held: dict[Any, Any], place: str) -> list[tuple[Any, int]]:
        for key in held:
            if not isinstance(key, str | int | bool | type(None)):
                raise NoTemplate(f"{place} has a {type(key).__name__} for a key")
        return [(key, self._add(value, f"{place}.{key}")) for key, value in held.items()]

    def _sequence(self, found: list[Any] | tuple[Any, ...], place: str, name: str) -> tuple[Step, str]:
        numbers = [self._add(value, f"{place}[{index}]") for index, value in enumerate(found)]
        kind: Any = type(found)
        if kind in (list, tuple):
            return (lambda made, tensors: kind([made[n] for n in numbers])), f"{name} {numbers}"
        if hasattr(kind, "_make") and hasattr(kind, "_fields"):
            return (lambda made, tensors: kind._make([made[n] for n in numbers])), f"{name} {numbers}"
        raise NoTemplate(f"{place} is a {name}")

    def _dictionary(self, found: dict[Any, Any], place: str, name: str) -> tuple[Step, str]:
        kind: Any = type(found)
        items, attributes = self._items(dict(found), place), self._items(getattr(found, "__dict__", {}), place)
        if kind is dict:
            return (lambda made, tensors: {key: made[n] for key, n in items}), f"{name} {items}"
        base: Any = OrderedDict if isinstance(found, OrderedDict) else dict

        def make(made: list[Any], tensors: Sequence[Any]) -> Any:
            new = base.__new__(kind)
            for key, number in items:
                base.__setitem__(new, key, made[number])
            new.__dict__.update({key: made[number] for key, number in attributes})
            return new

        if not hasattr(found, "__dict__"):
            raise NoTemplate(f"{place} is a {name}")
        return make, f"{name} {items} {attributes}"


def _word(found: Any) -> str:
    if isinstance(found, type | FunctionType | BuiltinFunctionType):
        return found.__qualname__
    return repr(found) if isinstance(found, _AS_THEY_ARE) else ""
