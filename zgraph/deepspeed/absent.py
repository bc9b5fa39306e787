"""Errors for names that DeepSpeed's modules have and those here have not."""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

from zgraph.errors import AbsentError, AbsentImportError


def finder(module: str, remedies: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a module that knows what to do in the place of some names.

    Args:
        module: the module's name.
        remedies: for each name of DeepSpeed's that is not there, what to do instead.
    """

    def find(name: str) -> Any:
        if name not in remedies:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        said = f"{module} has no {name}: {remedies[name]}"
        if _imports(sys._getframe(1)):
            raise AbsentImportError(said)
        raise AbsentError(said)

    return find


def _imports(frame: FrameType) -> bool:
    """Whether a frame is at `from module import name`, which forgets an AttributeError and what that said."""
    return dis.opname[frame.f_code.co_code[frame.f_lasti]] == "IMPORT_FROM"
