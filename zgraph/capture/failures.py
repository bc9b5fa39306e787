"""Errors of a call that fails while it is captured: the user's own error as it is, or what zgraph says of it.

torch.compile tells of an error in the forward in its own words, and under two hundred lines of its own frames. The
forward is then run once more, on tensors without data and only as far as the error, which gives the error itself, its
class and its lines.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from traceback import extract_tb
from types import TracebackType
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from zgraph.bridge import private_compile
from zgraph.environment import environment
from zgraph.errors import CaptureError, GraphBreakError, ZgraphError

TORCH = Path(torch.__file__).parent
OURS = Path(__file__).parents[1]
_MADE_UP = re.compile(r"<.*>")
"""The file of code that has none: what torch compiles, and frozen modules."""


def failure(error: Exception, run: Callable[[], Any], name: str) -> Exception:
    """Error to raise for a call that fails while it is captured.

    Args:
        error: the one that torch.compile raised.
        run: calls the forward as it was called.
        name: of the model.
    """
    if environment().traceback == "full" and isinstance(error, private_compile.BackendCompilerFailed):
        return error.inner_exception if isinstance(error.inner_exception, ZgraphError) else error
    if isinstance(error, private_compile.BackendCompilerFailed):
        return _of_compiling(error.inner_exception)
    if isinstance(error, private_compile.FailOnRecompileLimitHit):
        return _too_often()
    if may_be_the_users(error) and (raised := private_compile.raised_without_data(run)) is not None:
        return _of_the_user(raised, name)
    if isinstance(error, private_compile.Unsupported | private_compile.UserError | GuardOnDataDependentSymNode):
        return _graph_break(error)
    return _shortened(error, (TORCH,))


def _too_often() -> CaptureError:
    guard, limit = private_compile.last_guard(), torch._dynamo.config.recompile_limit
    why = f" The guard that failed last: {guard}." if guard else ""
    return CaptureError(
        f"the forward was captured {limit} times, and this call has another value once more.{why} Where that is a "
        "size, pass dynamic=True to zgraph.compile; where it is a number or a list that the module keeps, keep it in a "
        "buffer; where there are just more cases, raise torch._dynamo.config.recompile_limit"
    )


def may_be_the_users(error: Exception) -> bool:
    """Whether torch.compile tells of an error that the forward raises by itself, by what it says and where."""
    if isinstance(error, private_compile.TorchRuntimeError):
        return True
    stack = getattr(error, "real_stack", None)
    if not isinstance(error, private_compile.TorchDynamoException):
        return stack is not None  # of an op that looks at what it is given; without a stack the program itself ran
    said = str(error).lower()
    if any(words in said for words in ("observed exception", "assertion failed", "failed to bind arguments")):
        return True
    return any((frame.line or "").split(":")[-1].strip().startswith("raise ") for frame in stack or ())


def shortened(traceback: TracebackType | None, hidden: tuple[Path, ...]) -> TracebackType | None:
    """A traceback without frames of files in these folders, and of code that has no file."""
    kept = [step for step in _steps(traceback) if not _is_hidden(step.tb_frame.f_code.co_filename, hidden)]
    found: TracebackType | None = None
    for step in reversed(kept):
        found = TracebackType(found, step.tb_frame, step.tb_lasti, step.tb_lineno)
    return found


def first_line(error: Exception) -> str:
    """The first line that an error says, or its class."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _of_compiling(error: Exception) -> Exception:
    """An error of the passes, or of what compiles: one that zgraph means to say has no traceback of use."""
    if isinstance(error, ZgraphError):
        error.__suppress_context__ = True
        return error.with_traceback(None)
    return _shortened(error, (TORCH,))


def _of_the_user(error: Exception, name: str) -> Exception:
    frames = extract_tb(shortened(error.__traceback__, (TORCH, OURS)))
    at, line = (f" at {frames[-1].filename}:{frames[-1].lineno}", f": {frames[-1].line}") if frames else ("", "")
    error.add_note(f"raised{at}, while zgraph captured the forward of {name}{line}")
    return _shortened(error, (TORCH, OURS))


def _shortened(error: Exception, hidden: tuple[Path, ...]) -> Exception:
    """The error without torch's frames, unless ZGRAPH_TRACEBACK=full asks for them."""
    if environment().traceback == "full":
        return error
    if error.__cause__ is None:
        error.__suppress_context__ = True
    return error.with_traceback(shortened(error.__traceback__, hidden))


def _steps(traceback: TracebackType | None) -> Iterator[TracebackType]:
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


def _is_hidden(file: str, folders: tuple[Path, ...]) -> bool:
    if _MADE_UP.fullmatch(file):
        return file not in ("<stdin>", "<string>")  # where a user types
    return any(folder in Path(file).parents for folder in folders)


def _graph_break(error: Exception) -> GraphBreakError:
    frame = next(iter(reversed(getattr(error, "real_stack", None) or ())), None)
    where = f"\n  at {frame.filename}:{frame.lineno}\n    {frame.line}" if frame is not None else ""
    detail = re.search(r"Developer debug context: (.+)", str(error))
    if detail and detail.group(1).startswith("raised exception "):
        return GraphBreakError(f"the forward {detail.group(1)}{where}")
    return GraphBreakError(
        f"the forward cannot be captured as one graph: {first_line(error)}"
        f"{f' ({detail.group(1)})' if detail else ''}{where}\n"
        "  Remedy: take the line out of the forward (a print, a data-dependent branch, .item()), or pass "
        "fullgraph=False to zgraph.compile, which captures the forward in pieces and runs this line eagerly."
    )
