"""Errors of the job's key-value store, which ends with the process that keeps it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from zgraph.errors import PeerError

STORE_IS_GONE = "the process that keeps the job's key-value store (the first rank, or the launcher) is gone"


@contextmanager
def store_errors() -> Iterator[None]:
    """The store ends with the process that keeps it."""
    try:
        yield
    except RuntimeError as error:
        raise PeerError(
            f"the job's key-value store does not answer ({error}): {STORE_IS_GONE}. Start the job again from its last "
            "checkpoint."
        ) from None
