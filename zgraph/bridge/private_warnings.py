"""Warnings in a forward that is captured, a private corner of torch. Tried on torch 2.13.0."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch._dynamo.variables.misc import DebuggingVariable

__all__ = ["warning_by_category"]


@contextmanager
def warning_by_category() -> Iterator[None]:
    """Have a `warnings.warn` that names a class told when the graph has run, too: torch knows only constants."""
    owner: Any = DebuggingVariable
    before = owner.can_reorder_logs

    def can_reorder(fn: Any, args: Any, kwargs: Any) -> bool:
        if fn is warnings.warn:
            args = [a for a in args if not _is_warning(a)]
            kwargs = {name: a for name, a in kwargs.items() if not _is_warning(a)}
        return bool(before(fn, args, kwargs))

    owner.can_reorder_logs = staticmethod(can_reorder)
    try:
        yield
    finally:
        owner.can_reorder_logs = staticmethod(before)


def _is_warning(variable: Any) -> bool:
    found = variable.as_python_constant() if variable.is_python_constant() else None
    return isinstance(found, type) and issubclass(found, Warning)
