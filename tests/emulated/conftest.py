"""The emulated device: a library that is built once, and processes that have loaded it."""

import os
from collections.abc import Callable, Iterator
from functools import cache

import pytest

from tests.emulated.build import compiler, library
from tests.emulated.cases import CASES
from tests.emulated.server import Server
from tests.emulated.training import Trained, train

NUM_ECHOES = 4


@pytest.fixture(scope="session")
def built() -> None:
    """The library; without a compiler these tests are skipped, unless ZGRAPH_NEEDS_EMULATED says that they must run."""
    if compiler() is None:
        assert not os.environ.get("ZGRAPH_NEEDS_EMULATED"), "the emulated device needs g++, and there is none"
        pytest.skip("the emulated device needs g++")
    library()


@pytest.fixture(scope="session")
def echoes(built: None) -> Iterator[Server]:
    """One process, whose group has four ranks: the others are its echoes."""
    server = Server("echo", NUM_ECHOES)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def trained(echoes: Server) -> Callable[[str], Trained]:
    """A function from the name of a case to its training, which runs once."""

    @cache
    def run(name: str) -> Trained:
        found: Trained = echoes.run(train, CASES[name])
        return found

    return run


@pytest.fixture(scope="session")
def pair(built: None) -> Iterator[Server]:
    """Two ranks over gloo."""
    server = Server("staged", 2)
    yield server
    server.stop()
