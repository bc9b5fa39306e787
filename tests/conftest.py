"""Hooks that all tests share."""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))  # for `benchmarks` and `tests`, which are not installed
from tests.deep import left_out, stale

os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it when it is imported

OF_TESTS = ("ZGRAPH_DEEP", "ZGRAPH_NEEDS_EMULATED", "ZGRAPH_TESTS_CACHE")
for _name in [name for name in os.environ if name.startswith("ZGRAPH_") and name not in OF_TESTS]:
    del os.environ[_name]  # what the user set for zgraph changes no test
os.environ["ZGRAPH_PLANS"] = "0"  # the passes run in each test, but for those of kept plans


def pytest_configure() -> None:
    """Let texts of tests name an op of the user's own; zgraph imports triton, so not before that is told."""
    from zgraph.ir import allow_namespace

    allow_namespace("user")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what `make test-deep` alone runs."""
    names = {item.nodeid.removeprefix("tests/"): item for item in items}
    if all(Path(arg).is_dir() for arg in config.args) and not config.option.keyword and (missing := stale(names)):
        raise pytest.UsageError(f"tests/deep.py names tests that are not there: {', '.join(missing)}")
    for name in left_out([*names]):
        names[name].add_marker(pytest.mark.skip(reason="make test-deep"))


def pytest_collection_finish() -> None:
    """Keep torch's trace log unused.

    pytest attaches its handler to every logger that does not propagate, and with a handler torch.compile writes each
    graph that it meets, at length, into this one.
    """
    logging.getLogger("torch.__trace").propagate = True


@pytest.fixture(autouse=True)
def _kernels_run() -> Iterator[None]:
    """A kernel that does not run fails its test, instead of leaving its work to its reference."""
    from zgraph.codegen.fallback import failures_raised

    with failures_raised():
        yield
