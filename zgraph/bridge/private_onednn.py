"""Whether torch takes oneDNN's kernels, a private corner of torch. Tried on torch 2.11.0 and 2.13.0."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["as_outside", "plain_recurrence"]

_outside: list[bool] = []
"""Whether oneDNN was enabled, for each `plain_recurrence` that is under way."""


@contextmanager
def plain_recurrence() -> Iterator[None]:
    """Trace LSTM on processors as products and activations: the workspace of oneDNN's kernel is no tensor at times."""
    _outside.append(torch._C._get_mkldnn_enabled())
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(_outside.pop())


@contextmanager
def as_outside() -> Iterator[bool]:
    """Run ops within a capture as they run outside of it: with oneDNN, if the user has not disabled it."""
    enabled = torch._C._get_mkldnn_enabled()
    found = _outside[0] if _outside else enabled
    torch._C._set_mkldnn_enabled(found)
    try:
        yield found
    finally:
        torch._C._set_mkldnn_enabled(enabled)
