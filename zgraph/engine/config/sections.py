"""Sections of a configuration: what keys they have, which others decide now, and every problem told at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from zgraph.errors import ConfigError, did_you_mean

S = TypeVar("S", bound="Section")

NO_EFFECT = " has no effect: "
"""Words in a note between a key's place and what decides instead."""


class Section(BaseModel):
    """A part of a configuration.

    Class variables of a section:
        ignored: keys that DeepSpeed has and that need no deciding here, each with what decides instead.
        unsupported: keys that DeepSpeed has and that would change what is computed or needed, each with the remedy.
            They may be there if they ask for nothing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    ignored: ClassVar[Mapping[str, str]] = {}
    unsupported: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def keys(cls) -> dict[str, type[Section] | None]:
        """Every key that means something here, with the section that its value is, if it is one."""
        found: dict[str, type[Section] | None] = {}
        for name, info in cls.model_fields.items():
            kinds = [k for k in (info.annotation, *get_args(info.annotation)) if isinstance(k, type)]
            section = next((k for k in kinds if issubclass(k, Section)), None)
            found[name] = section
        return found


@dataclass
class Reading:
    """Problems and notes that were found while a configuration was read.

    Args:
        problems: all that is wrong, each with its place.
        notes: for keys that have no effect here, what decides instead.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def read(self, kind: type[S], found: Mapping[str, Any], path: str = "") -> S | None:
        """A section from a mapping; None if there were problems, which are then among `problems`."""
        count = len(self.problems)
        kept = self.kept(kind, found, path)
        try:
            made = kind.model_validate(kept)
        except ValidationError as error:
            self.problems += [
                f"{'.'.join(filter(None, [path, *map(str, e['loc'])]))}: {_said(e['msg'])}" for e in error.errors()
            ]
            return None
        return made if len(self.problems) == count else None

    def kept(self, kind: type[Section], found: Mapping[str, Any], path: str) -> dict[str, Any]:
        """The keys that mean something, of sections within, too."""
        keys = kind.keys()
        kept: dict[str, Any] = {}
        for key, value in found.items():
            place = f"{path}.{key}" if path else str(key)
            if key in keys:
                inner = keys[key]
                within = inner is not None and isinstance(value, Mapping)
                kept[key] = self.kept(inner, value, place) if inner is not None and within else value
            elif key in kind.ignored:
                self.notes.append(f"{place}{NO_EFFECT}{kind.ignored[key]}")
            elif key in kind.unsupported:
                if asks(value):
                    self.problems.append(f"{place}: zgraph does not have this; {kind.unsupported[key]}")
            else:
                self.problems.append(f"{place}: there is no such key{_hint(str(key), kind)}")
        return kept

    def finish(self) -> None:
        """Raise ConfigError if there were problems."""
        if self.problems:
            raise ConfigError(self.problems)


def asks(value: Any) -> bool:
    """Whether a value asks for something: not False, none, 0, "auto", nor a section that is not enabled."""
    if isinstance(value, Mapping):
        return bool(value.get("enabled", bool(value)))
    return value is True or value not in (None, False, 0, 1, "", "auto", "none", [])


def _hint(key: str, kind: type[Section]) -> str:
    known = [*kind.keys(), *kind.ignored, *kind.unsupported]
    return "; " + did_you_mean(key, known, f"the keys here are {', '.join(kind.keys())}")


def _said(message: str) -> str:
    return message.removeprefix("Value error, ").removeprefix("Assertion failed, ")


def flatten(found: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value within mappings, with its place."""
    for key, value in found.items():
        place = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping):
            yield from flatten(value, place)
        else:
            yield place, value
