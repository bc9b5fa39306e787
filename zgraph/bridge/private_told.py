"""Calls of `print`, `warnings.warn` and loggers in a captured forward, a private corner of torch.

Tried on torch 2.13.0. torch makes such calls when the graph has run, but loses those of a function that is called by
another, and keyword arguments; it breaks the graph at a logger and at a class of warnings.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch._dynamo.source import GlobalSource
from torch._dynamo.variables import ConstantVariable
from torch._dynamo.variables.misc import DebuggingVariable, LoggingLoggerVariable

__all__ = ["told_afterwards"]

_METHODS = ("debug", "info", "warning", "warn", "error", "critical", "log")


@contextmanager
def told_afterwards() -> Iterator[None]:
    """Context in whose captures these calls are made when the graph has run, in their order and as they were written.

    A call whose arguments are no tensors, constants or strings of them breaks the graph.
    """
    printer: Any = DebuggingVariable
    logger: Any = LoggingLoggerVariable
    call_function, call_method = printer.call_function, logger.call_method

    def call(self: Any, tx: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return _told(tx, self.value, args, kwargs) or call_function(self, tx, args, kwargs)

    def log(self: Any, tx: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        try:
            return call_method(self, tx, name, args, kwargs)  # those that the user's settings ignore
        except Exception:
            told = None
            if name in _METHODS and "exc_info" not in kwargs:
                told = _told(tx, getattr(self.value, name), args, kwargs)
            if told is None:
                raise
            return told

    printer.call_function, logger.call_method = call, log
    try:
        yield
    finally:
        printer.call_function, logger.call_method = call_function, call_method


def _told(tx: Any, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The result of a call that is made when the graph has run; None where it cannot wait."""
    if not all(value.is_python_constant() for value in kwargs.values()):
        return None
    if not DebuggingVariable.can_reorder_logs(function, [a for a in args if not a.is_python_constant()], {}):
        return None
    options = {name: value.as_python_constant() for name, value in kwargs.items()}
    if function is warnings.warn:
        whole = partial(_warn, *_place(tx, options.pop("stacklevel", 1)), **options)
    else:
        whole = partial(function, **options)
    name = tx.output.install_global("zgraph_told", whole)
    told: Any = DebuggingVariable(whole, source=GlobalSource(name))
    tx.output.root_tx.debug_locals.append((told, list(args)))
    return ConstantVariable.create(None)


def _place(tx: Any, stacklevel: int) -> tuple[str, int, dict[str, Any]]:
    """File, line and globals of the frame that a warning is about."""
    for _ in range(stacklevel - 1):
        tx = getattr(tx, "parent", None) or tx
    return tx.f_code.co_filename, tx.lineno, tx.f_globals


def _warn(
    file: str, line: int, scope: dict[str, Any], message: str, category: type[Warning] | None = None, **options: Any
) -> None:
    """Warn as at that place, once or each time as the user's filters say."""
    registry = scope.setdefault("__warningregistry__", {})
    module = scope.get("__name__") or "unknown"
    source = options.get("source")
    warnings.warn_explicit(message, category or UserWarning, file, line, module, registry, source=source)
