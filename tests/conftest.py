"""What all tests share."""

import logging


def pytest_collection_finish() -> None:
    """Keep torch's trace log unused.

    pytest attaches its handler to every logger that does not propagate, and with a handler torch.compile writes each
    graph that it meets, at length, into this one.
    """
    logging.getLogger("torch.__trace").propagate = True
