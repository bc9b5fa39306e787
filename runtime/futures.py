"""A collective or a copy under way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from zgraph.runtime.host import Copy
from zgraph.runtime.transfers import Transfer

Work = dist.Work | Transfer


class Future:
    """A collective or a copy under way: what to wait for, and how to get the result once it is there."""

    __slots__ = ("finish", "held", "name", "work")

    def __init__(
        self, name: str, work: Work | Copy | None, held: Any, finish: Callable[[], torch.Tensor | None]
    ) -> None:
        self.name, self.work, self.held, self.finish = name, work, held, finish
