"""Ctrl-C ends a rank with one line, not with the place where each of them waited."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

from zgraph.environment import environment
from zgraph.errors import PeerError

Hook = Callable[[type[BaseException], BaseException, TracebackType | None], Any]
"""Function that Python calls with an uncaught error, as `sys.excepthook`."""


def say_little() -> None:
    """Have this process say little when it is interrupted."""
    sys.excepthook = quiet(sys.excepthook)


def quiet(before: Hook) -> Hook:
    """A hook that says one line of an interrupt, and hands on other errors; a hook of the user's own stays as it is."""
    is_usual = before is sys.__excepthook__ or getattr(before, "__module__", "").startswith("torch.")
    return partial(_told, before) if is_usual else before  # torch's names the rank in each line


def was_interrupted(error: BaseException) -> bool:
    """Whether an error is an interrupt, here or on the rank that this one waited for."""
    return isinstance(error, KeyboardInterrupt) or (isinstance(error, PeerError) and _NAME in str(error))


_NAME = f"{KeyboardInterrupt.__name__} on rank "


def _told(before: Hook, kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if was_interrupted(error) and environment().traceback == "short":
        sys.stderr.write(f"zgraph: rank {os.environ.get('RANK', '0')} was interrupted\n")
    else:
        before(kind, error, traceback)
