"""Cases that take long and add little: left out by `make test`, run by `make test-deep`."""

import os
from typing import Any

import pytest

DEEP = bool(os.environ.get("ZGRAPH_DEEP"))


def deep(*values: Any, id: str | None = None) -> Any:
    """A case of `pytest.mark.parametrize` that `make test-deep` alone runs."""
    return pytest.param(*values, id=id, marks=pytest.mark.skipif(not DEEP, reason="make test-deep"))
