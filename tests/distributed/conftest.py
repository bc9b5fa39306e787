"""The one pool of workers of the session."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from .pool import Pool


@pytest.hookimpl(tryfirst=True)  # before xdist looks for groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of this folder run in one process, which has the pool, also where pytest has several."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("pool"))


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Four processes joined by gloo."""
    pool = Pool()
    yield pool
    pool.stop()
