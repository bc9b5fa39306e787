"""Keeps torch.compile, around a compiled model, off zgraph's own functions. Tried on torch 2.11.0 and 2.13.0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from torch._C._dynamo import eval_frame

__all__ = ["inline_only_when_called", "never_captured_alone", "pause_capture", "resume_capture"]


def inline_only_when_called(file: str) -> None:
    """Have torch.compile trace the functions of a file, or of a folder (with a slash at its end), where a captured
    function calls them, and capture none alone.
    """
    rules: Any = torch._dynamo.trace_rules
    if hasattr(rules, "BUILTIN_INLINE_WHEN_CALLED"):  # without it, as in torch 2.11, they are captured alone too
        rules.BUILTIN_INLINE_WHEN_CALLED.add(file)
        rules.SKIP_DIRS.append(file)
        rules._recompile_re()


def never_captured_alone(function: Callable[..., Any]) -> None:
    """Have torch.compile trace a function where a captured function calls it, and not where eager code does."""
    torch._dynamo.eval_frame.skip_code(function.__code__)


def pause_capture() -> Any:
    """Have what runs on this thread from here on run as it is, within a function under torch.compile too.

    Returns: what to give `resume_capture`. Where an error leaves it paused, torch.compile ends that at its own end.
    """
    _run_as_it_is()
    return eval_frame.set_eval_frame(None)


def resume_capture(before: Any) -> None:
    """End what `pause_capture` began."""
    if before is not None:
        eval_frame.set_eval_frame(before)


def _run_as_it_is() -> None:
    """Have torch.compile leave a function that calls this as it is; where it must not, it says why."""


_run_as_it_is = torch.compiler.disable(  # type: ignore[no-untyped-call]
    _run_as_it_is,
    reason="this is a model compiled by zgraph.compile, or an optimizer's step over its shards, which torch.compile "
    "cannot take into a graph of its own. Leave torch.compile out, around the model and around the training step, or "
    "pass fullgraph=False to it",
)
