"""The one pool of workers of the session."""

from collections.abc import Iterator

import pytest

from .pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Four processes joined by gloo."""
    pool = Pool()
    yield pool
    pool.stop()


@pytest.fixture(scope="module")
def pair() -> Iterator[Pool]:
    """Two ranks alone."""
    found = Pool(2)
    yield found
    found.stop()
