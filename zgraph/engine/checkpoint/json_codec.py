"""Values that JSON can hold, and mappings whose keys are not text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zgraph.errors import CheckpointError

_PAIRS = "~pairs"
"""The key under which a mapping lies whose keys are not text."""


def encode(value: Any, place: str) -> Any:
    """The value as JSON holds it; tuples become lists.

    Raises:
        CheckpointError: it is something else; the error names the key.
    """
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, list | tuple):
        return [encode(item, f"{place}[{at}]") for at, item in enumerate(value)]
    if isinstance(value, Mapping):
        found = {key: encode(item, f"{place}.{key}") for key, item in value.items()}
        if _PAIRS not in found and all(isinstance(key, str) for key in found):
            return found
        return {_PAIRS: [[encode(key, f"a key of {place}"), item] for key, item in found.items()]}
    raise CheckpointError(
        f"{place} is a {type(value).__name__}, and a checkpoint holds numbers, texts, lists and mappings beside its "
        f"tensors: convert it (tensor.item(), tensor.tolist()), or leave it out"
    )


def decode(value: Any) -> Any:
    """The value that `encode` was given."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if isinstance(value, dict):
        if set(value) == {_PAIRS}:
            return {_hashable(decode(key)): decode(item) for key, item in value[_PAIRS]}
        return {key: decode(item) for key, item in value.items()}
    return value


def _hashable(key: Any) -> Any:
    return tuple(map(_hashable, key)) if isinstance(key, list) else key
