"""Tensors without data, a private corner of torch. Tried on torch 2.11.0 and 2.13.0."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)

__all__ = ["UNKNOWN_RESULTS", "FakeTensor", "FakeTensorMode", "deriving"]

UNKNOWN_RESULTS = (
    NotImplementedError,
    DynamicOutputShapeException,
    DataDependentOutputException,
    UnsupportedFakeTensorException,
)
"""Raised by an op where torch cannot say what it makes without data."""


@contextmanager
def deriving() -> Iterator[None]:
    """Ops make tensors without data, and torch logs no traceback for operands that do not fit."""
    logger = logging.getLogger(FakeTensor.__module__)
    before, logger.disabled = logger.disabled, True
    try:
        with FakeTensorMode():
            yield
    finally:
        logger.disabled = before
