"""The reference of a kernel in its place where the kernel does not run: told once, and then for good."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch

from zgraph.errors import ZgraphError, in_one_line

T = TypeVar("T")

_failed: set[Hashable] = set()
"""Kernels that did not run once, in this process."""

_raises: ContextVar[bool] = ContextVar("zgraph_raises_failures", default=False)


@contextmanager
def failures_raised(raises: bool = True) -> Iterator[None]:
    """Context in which a kernel that does not run raises its error, as whoever measures or tests wants it."""
    token = _raises.set(raises)
    try:
        yield
    finally:
        _raises.reset(token)


def launched(kernel: Hashable, launch: Callable[[], T], reference: Callable[[], T]) -> T:
    """The results of a kernel, or of its reference if the kernel does not run.

    A kernel that the compiler refuses, or that needs more of the GPU than it has, raises before it writes anything. One
    that fails while it runs breaks the device, so that the reference raises too.

    Args:
        kernel: whose text names it.
        launch: compiles and starts it.
        reference: computes the same by ops of torch.

    Raises:
        KernelError: what is computed makes no sense.
        torch.OutOfMemoryError: the results have no room.
    """
    if kernel in _failed and not _raises.get():
        return reference()
    try:
        return launch()
    except (ZgraphError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if _raises.get():
            raise
        made = reference()
        _failed.add(kernel)
        warnings.warn(
            f"a generated kernel does not run here ({in_one_line(error)}); torch's own ops compute the same in its "
            f'place, more slowly: {str(kernel)[:120]}. kernels="aten" leaves all generated kernels out.',
            stacklevel=2,
        )
        return made


def has_failed(kernel: Hashable) -> bool:
    """Whether a kernel did not run before."""
    return kernel in _failed
