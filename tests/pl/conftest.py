"""Two processes of their own: a Trainer takes all ranks that there are; it leaves a group and variables behind."""

import os
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from tests.hf.conftest import _one_thread as _one_thread
from tests.hf.conftest import pair as pair


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    before = dict(os.environ)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)
