"""The passes by name: zgraph's own, those of installed packages, and those that were registered.

A package offers passes by an entry point of the group `zgraph.passes`:

    [project.entry-points."zgraph.passes"]
    double = "my_package.passes:Double"
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import TypeVar

from zgraph.errors import RecipeError
from zgraph.passes.core.base import Pass

GROUP = "zgraph.passes"

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_OPTIONS = (bool, int, float, str)

_built_in: dict[str, type[Pass]] = {}
_registered: dict[str, type[Pass]] = {}

P = TypeVar("P", bound=type[Pass])


def build_in(kinds: tuple[type[Pass], ...]) -> None:
    """Make zgraph's own passes known."""
    _built_in.update((kind.name, kind) for kind in kinds)


def register_pass(kind: P) -> P:
    """Make a user-defined pass known to recipes, ZGRAPH_DISABLE and the command line; a decorator, too.

    Registering a class anew (in a notebook, say) replaces it.

    Args:
        kind: a frozen dataclass derived from `zgraph.passes.Pass`. Its fields are its options: bool, int, float or str,
            each with a default.

    Returns:
        The class.

    Raises:
        RecipeError: it is no such class, or a pass of that name is there already.
    """
    if problem := _problem(kind):
        raise RecipeError(f"cannot register {getattr(kind, '__name__', kind)}: {problem}")
    known = {**_built_in, **_registered, **_installed()}.get(kind.name)
    if known is not None and _place(known) != _place(kind):
        raise RecipeError(f"there is a pass called {kind.name} already ({'.'.join(_place(known))}): call it otherwise")
    _registered[kind.name] = kind
    return kind


def known_passes() -> Mapping[str, type[Pass]]:
    """All passes that a recipe may name.

    Raises:
        RecipeError: a package's entry point names no pass.
    """
    return {**_built_in, **_installed(), **_registered}


@cache
def _installed() -> Mapping[str, type[Pass]]:
    """The passes of installed packages."""
    found: dict[str, type[Pass]] = {}
    for entry in entry_points(group=GROUP):
        try:
            kind = entry.load()
        except Exception as error:  # of the package, whatever it is
            raise RecipeError(
                f"the entry point {entry.name} of the group {GROUP} ({entry.value}) cannot be loaded: "
                f"{type(error).__name__}: {error}"
            ) from error
        problem = _problem(kind) or ("a pass of that name is zgraph's own" if kind.name in _built_in else "")
        if problem:
            raise RecipeError(f"the entry point {entry.name} of the group {GROUP} ({entry.value}): {problem}")
        found[kind.name] = kind
    return found


def _problem(kind: object) -> str:
    """Why something is no pass that can be registered; nothing if it is one."""
    if not (isinstance(kind, type) and issubclass(kind, Pass)):
        return "it is no class derived from zgraph.passes.Pass"
    if not (dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen):  # type: ignore[attr-defined]
        return "it is no frozen dataclass; put @dataclass(frozen=True) above it"
    if kind.__abstractmethods__:
        return f"it lacks {', '.join(sorted(kind.__abstractmethods__))}"
    name = getattr(kind, "name", None)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return f"its name is {name!r}; it must be words of small letters and digits, joined by hyphens"
    for field in dataclasses.fields(kind):
        if type(field.default) not in _OPTIONS:
            return f"the option {field.name} has no default that is a bool, int, float or str"
    return ""


def _place(kind: type[Pass]) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__
