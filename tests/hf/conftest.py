"""Two processes of their own: an Accelerator takes all ranks that there are."""

from collections.abc import Iterator

import pytest
import torch

from tests.distributed.pool import Pool


@pytest.fixture(scope="session")
def pair() -> Iterator[Pool]:
    """Two processes joined by gloo."""
    pool = Pool(2)
    yield pool
    pool.stop()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()
