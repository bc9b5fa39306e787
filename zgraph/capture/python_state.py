"""Python state that a function may depend on, to notice that it was changed: attributes, globals, what closures hold.

Of every dictionary, list and object that can be reached, the values are noted by identity. To look again compares
identities, which takes some 30 ns each; a value that is another object but an equal number or word is no change.
"""

from __future__ import annotations

import enum
import functools
import logging
import re
import threading
import weakref
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain
from operator import is_
from pathlib import Path
from types import (
    BuiltinFunctionType,
    CodeType,
    EllipsisType,
    FunctionType,
    MappingProxyType,
    MethodType,
    ModuleType,
    NotImplementedType,
)
from typing import Any

import torch
from torch import nn

MAX_VALUES = 400_000
"""Values that are looked at in each call; a model with more has its calls captured."""

_WORDS = (bool, int, float, complex, str, bytes)

_AS_ONE = (
    *_WORDS,
    type(None),
    type,
    enum.Enum,
    logging.Logger,
    re.Pattern,
    Path,
    range,
    slice,
    property,
    staticmethod,
    classmethod,
    functools.cached_property,
    weakref.ReferenceType,
    EllipsisType,
    NotImplementedType,
    FunctionType,
    BuiltinFunctionType,
    CodeType,
    torch.Tensor,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    type(threading.Lock()),
)
"""Kinds of objects that are known by their identity: they do not change, or nothing reads what in them does."""

_C_KINDS = {"method_descriptor", "wrapper_descriptor", "method-wrapper", "getset_descriptor", "member_descriptor"}

_MISSING = object()


@dataclass(frozen=True, slots=True)
class _Pick:
    """Value found under one name: its owner, the dictionary that it is in, itself, and its place in words."""

    owner: Any
    held: Mapping[str, Any]
    before: Any
    place: str


class PythonState:
    """The values that were noted.

    `problem` says why calls cannot be told apart by them; empty where they can.
    """

    def __init__(self) -> None:
        self.problem = ""
        self._seen: dict[int, object] = {}
        self._views: list[Iterable[Any]] = []
        self._owners: list[tuple[str, Any]] = []
        self._values: list[Any] = []
        self._counts: list[int] = []
        self._picked: dict[tuple[int, str], _Pick] = {}
        self._getters: list[tuple[Any, str]] = []
        self._before: list[Any] = []
        self._cells: list[tuple[Any, Any, str]] = []
        self._caches: list[tuple[Any, int]] = []

    @property
    def num_values(self) -> int:
        return len(self._values)

    def holds(self, found: object) -> bool:
        """Whether an object is one whose values were noted."""
        return id(found) in self._seen

    # --- noting ------------------------------------------------------------------------------------------------

    def note(self, root: Any, place: str) -> None:
        """Note what an object holds, and what that holds, and so on."""
        todo = [(root, place)]
        while todo:
            found, where = todo.pop()
            if id(found) in self._seen or self._is_one(found, where):
                continue
            self._seen[id(found)] = found
            parts = list(_parts(found))
            if not parts and not isinstance(found, tuple | list | dict | set | frozenset | deque):
                self.refuse(f"{where} is a {type(found).__name__}, which may change unseen")
            for view, owner in parts:
                held = [*view]
                self._views.append(view)
                self._owners.append((where, owner))
                self._values += held
                self._counts.append(len(held))
                if isinstance(owner, dict) and held and not isinstance(view, type({}.keys())):
                    todo += [(value, f"{where}.{key}") for key, value in owner.items()]
                elif not isinstance(view, type({}.keys())):
                    todo += [(value, f"{where}[{i}]") for i, value in enumerate(held)]
            if len(self._values) > MAX_VALUES:
                self.refuse(f"the model holds more than {MAX_VALUES:,} values")
                return

    def pick(self, owner: ModuleType | type | Mapping[str, Any], name: str, place: str) -> None:
        """Note what a module, a class or the globals of a function have under one name."""
        key = id(owner), name
        if key not in self._picked:
            held = owner if isinstance(owner, Mapping) else vars(owner)
            found = held.get(name, _MISSING)
            self._picked[key] = _Pick(owner, held, found, f"{place}.{name}")
            self._note_cache(found)
            self.note(found, f"{place}.{name}")

    def note_class(self, kind: type) -> None:
        """Note what a class and those that it is made of have, but for torch's."""
        for base in kind.__mro__:
            if base.__module__.partition(".")[0] not in ("torch", "builtins"):
                for name in vars(base):
                    if not (name.startswith("__") and name.endswith("__")) or name == "__call__":
                        self.pick(base, name, base.__qualname__)

    def finish(self, names: Collection[str]) -> None:
        """Look only at those attributes of classes from now on whose names functions use."""
        kept = {k: p for k, p in self._picked.items() if not isinstance(p.owner, type) or k[1] in names}
        self._picked = kept
        self._getters = [(pick.held.get, name) for (_, name), pick in kept.items()]
        self._before = [pick.before for pick in kept.values()]

    def close_over(self, function: FunctionType) -> None:
        """Note what a function has in its closure. A default that may change is refused."""
        for cell, name in zip(function.__closure__ or (), function.__code__.co_freevars, strict=False):
            try:
                found = cell.cell_contents
            except ValueError:
                continue
            self._cells.append((cell, found, f"{name} of {function.__qualname__}"))
            self.note(found, f"{name} of {function.__qualname__}")
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            if isinstance(default, list | dict | set | deque):
                self.refuse(f"{function.__qualname__} has a {type(default).__name__} for a default, which may change")

    def _note_cache(self, found: Any) -> None:
        if isinstance(found, functools._lru_cache_wrapper):
            self._caches.append((found, found.cache_info().misses))

    def _is_one(self, found: Any, where: str) -> bool:
        """Whether an object is known by its identity."""
        kind = type(found)
        if found is _MISSING or isinstance(found, _AS_ONE) or kind.__name__ in _C_KINDS:
            return True
        if isinstance(found, ModuleType | functools._lru_cache_wrapper):
            self._note_cache(found)
            return True
        owner = kind.__module__.partition(".")[0]
        return owner == "zgraph" or (owner == "torch" and not isinstance(found, nn.Module | tuple | list | dict))

    def refuse(self, why: str) -> None:
        """Say why calls cannot be told apart, if nothing was said before."""
        self.problem = self.problem or why

    # --- looking again -----------------------------------------------------------------------------------------

    def changed(self) -> str:
        """The place of something that is not as it was noted; empty where all is."""
        found = [*chain.from_iterable(self._views)]
        if len(found) == len(self._values) and all(map(is_, found, self._values)):
            place = ""
        else:
            place = self._changed_place()
        return place or self._changed_pick()

    def _changed_place(self) -> str:
        begin = 0
        for index, (view, (where, _)) in enumerate(zip(self._views, self._owners, strict=True)):
            held, count = [*view], self._counts[index]
            before = self._values[begin : begin + count]
            if len(held) != count or not all(map(_same, held, before)):
                return where
            self._values[begin : begin + count] = held
            begin += count
        return ""

    def _changed_pick(self) -> str:
        found = [get(name, _MISSING) for get, name in self._getters]
        if not self._getters or not all(map(is_, found, self._before)):
            for (_, name), pick in self._picked.items():
                if not _same(pick.held.get(name, _MISSING), pick.before):
                    return pick.place
        for cell, before, place in self._cells:
            if not _same(cell.cell_contents, before):
                return place
        return ""

    def restore(self) -> None:
        """Have all be as it was noted, and what functions keep of their results forgotten where they have kept more."""
        begin = 0
        for index, (view, (_, owner)) in enumerate(zip(self._views, self._owners, strict=True)):
            count = self._counts[index]
            before = self._values[begin : begin + count]
            begin += count
            held = [*view]
            if len(held) == count and all(map(is_, held, before)):
                continue
            if isinstance(owner, dict) and isinstance(view, type({}.keys())):
                values = self._values[begin : begin + count]  # those of a dictionary follow its keys
                owner.clear()
                owner.update(zip(before, values, strict=True))
            elif isinstance(owner, dict):
                owner.update(zip([*owner], before, strict=False))
            elif isinstance(owner, list):
                owner[:] = before
            elif isinstance(owner, set | deque):
                owner.clear()
                (owner.update if isinstance(owner, set) else owner.extend)(before)
        for (_, name), pick in self._picked.items():
            if isinstance(pick.held, dict) and pick.held.get(name, _MISSING) is not pick.before:
                pick.held.pop(name, None) if pick.before is _MISSING else pick.held.update({name: pick.before})
            elif isinstance(pick.owner, type) and pick.held.get(name, _MISSING) is not pick.before:
                setattr(pick.owner, name, pick.before)
        for cell, before, _ in self._cells:
            cell.cell_contents = before
        for cache, misses in self._caches:
            if cache.cache_info().misses != misses:
                cache.cache_clear()


def _parts(found: Any) -> Iterable[tuple[Iterable[Any], Any]]:
    """Views of the values that an object holds, each with what it is in."""
    if isinstance(found, dict):
        yield found.keys(), found
        yield found.values(), found
    elif isinstance(found, list | tuple | set | frozenset | deque):
        yield found, found
    elif isinstance(found, MethodType):
        yield (found.__self__,), found
    elif isinstance(found, functools.partial):
        yield (*found.args, *found.keywords.values()), found
    elif isinstance(found, MappingProxyType):
        yield found.values(), found
    elif isinstance(found, ContextVar):
        yield _InContext(found), found
    own = getattr(found, "__dict__", None)
    if isinstance(own, dict):
        yield own.keys(), own
        yield own.values(), own
    for kind in type(found).__mro__ if not isinstance(own, dict) else ():
        slots = kind.__dict__.get("__slots__", ())
        names = (slots,) if isinstance(slots, str) else tuple(slots)
        if names and not isinstance(found, tuple):
            yield _Slots(found, names), found


class _InContext:
    """The value of a variable of the context."""

    def __init__(self, found: ContextVar[Any]) -> None:
        self.found = found

    def __iter__(self) -> Any:
        return iter([self.found.get(_MISSING)])


class _Slots:
    """The values in the slots of an object."""

    def __init__(self, found: Any, names: tuple[str, ...]) -> None:
        self.found, self.names = found, names

    def __iter__(self) -> Any:
        return iter([getattr(self.found, name, _MISSING) for name in self.names])


def _same(now: Any, before: Any) -> bool:
    if now is before:
        return True
    return type(now) is type(before) and isinstance(now, _WORDS) and bool(now == before)
