"""What all tests share."""

import logging
import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # for `benchmarks`, which is not installed
os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it when it is imported


def pytest_configure() -> None:
    """Let texts of tests name an op of the user's own; zgraph imports triton, so not before that is told."""
    from zgraph.ir import allow_namespace

    allow_namespace("user")


def pytest_collection_finish() -> None:
    """Keep torch's trace log unused.

    pytest attaches its handler to every logger that does not propagate, and with a handler torch.compile writes each
    graph that it meets, at length, into this one.
    """
    logging.getLogger("torch.__trace").propagate = True
