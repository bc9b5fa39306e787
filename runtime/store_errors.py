"""Errors of the job's key-value store, which ends with the process that keeps it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from zgraph.errors import PeerError, ZgraphError

STORE_IS_GONE = "the process that keeps the job's key-value store (the first rank, or the launcher) is gone"


@contextmanager
def store_errors() -> Iterator[None]:
    """The store ends with the process that keeps it, and others may write to it.

    Raises:
        PeerError: it does not answer, or a word in it is none of the ranks'.
    """
    try:
        with damaged_words():
            yield
    except RuntimeError as error:
        raise PeerError(
            f"the job's key-value store does not answer ({error}): {STORE_IS_GONE}. Start the job again from its last "
            "checkpoint."
        ) from None


@contextmanager
def damaged_words() -> Iterator[None]:
    """Words in the store may be none that a rank has written.

    Raises:
        PeerError: one is not.
    """
    try:
        yield
    except ZgraphError:
        raise
    except (ValueError, RecursionError) as error:
        raise PeerError(
            f"a word in the job's key-value store is none that a rank has written ({error}). See that nothing else "
            "writes to the store, and that all ranks have one version of zgraph; then start the job again from its "
            "last checkpoint."
        ) from None
