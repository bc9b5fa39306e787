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


def say_little() -> None:
    """Have this process say little when it is interrupted, unless the user has a hook of their own."""
    before = sys.excepthook
    if before is sys.__excepthook__ or before.__module__.startswith("torch."):  # torch names the rank in each line
        sys.excepthook = partial(_told, before)


def was_interrupted(error: BaseException) -> bool:
    """Whether an error is an interrupt, here or on the rank that this one waited for."""
    return isinstance(error, KeyboardInterrupt) or (isinstance(error, PeerError) and _NAME in str(error))


_NAME = f"{KeyboardInterrupt.__name__} on rank "


Hook = Callable[[type[BaseException], BaseException, TracebackType | None], Any]


def _told(before: Hook, kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if was_interrupted(error) and environment().traceback == "short":
        sys.stderr.write(f"zgraph: rank {os.environ.get('RANK', '0')} was interrupted\n")
    else:
        before(kind, error, traceback)
