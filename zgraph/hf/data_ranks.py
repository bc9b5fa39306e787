"""An Accelerator that counts ranks which share a batch once: its loaders and its gathers are of data ranks.

Ranks that compute together are neighbours, so that a rank's batch has the number `rank // together`.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate.utils import recursively_apply

from zgraph.errors import ConfigError

Base: Any = object  # the methods are those of accelerate.Accelerator, which `by_data_ranks` puts behind this class


class DataRanks(Base):  # type: ignore[misc]
    """Class that `by_data_ranks` puts before an Accelerator's. All ranks call what gathers."""

    together = 1

    @property
    def num_processes(self) -> int:
        """Ranks that each have a batch of their own."""
        return int(super().num_processes) // self.together

    @property
    def process_index(self) -> int:
        """The number of this rank's batch."""
        return int(super().process_index) // self.together

    def gather(self, tensor: Any) -> Any:
        """As accelerate's, with what ranks that share a batch have given in it once."""
        return recursively_apply(self._once, super().gather(tensor))

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """As accelerate's, with each batch in it once."""
        use_gather_object = use_gather_object or not _is_of_tensors(input_data)
        if use_gather_object and int(super().process_index) % self.together:
            input_data = []  # the first rank of those that share a batch gives what it has
        return super().gather_for_metrics(input_data, use_gather_object)

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """As accelerate's, with what ranks that share a batch have given in it once."""
        if reduction == "sum" and int(super().process_index) % self.together:
            tensor = recursively_apply(torch.zeros_like, tensor)
        return super().reduce(tensor, reduction, scale)

    def _once(self, tensor: torch.Tensor) -> torch.Tensor:
        each = tensor.shape[0] // self.num_processes // self.together
        parts = tensor.reshape(self.num_processes, self.together, each, *tensor.shape[1:])
        return parts[:, 0].flatten(0, 1)


def by_data_ranks(accelerator: Any, together: int) -> None:
    """Have an Accelerator count data ranks; nothing where each rank has a batch of its own.

    Args:
        accelerator: an Accelerator, whose class is changed.
        together: ranks that share a batch.

    Raises:
        ConfigError: its first rank would read the batches of all.
    """
    if together == 1:
        return
    if accelerator.dispatch_batches:
        raise ConfigError(
            [
                "accelerator_config.dispatch_batches: ranks that compute together read the same rows themselves; leave "
                "it out"
            ]
        )
    accelerator.dataloader_config.dispatch_batches = False
    kind: Any = type(accelerator)
    accelerator.__class__ = _counting(kind)
    accelerator.together = together


@functools.cache
def _counting(kind: type[Any]) -> type[Any]:
    return type(kind.__name__, (DataRanks, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def seeded_by_data_rank(loader: Any, accelerator: Any) -> Any:
    """A loader of the Trainer, whose workers draw the same on ranks that share a batch."""
    base = getattr(loader, "base_dataloader", loader)
    start: Callable[..., Any] | None = getattr(base, "worker_init_fn", None)
    if isinstance(start, functools.partial) and "rank" in start.keywords:
        base.worker_init_fn = functools.partial(start, rank=accelerator.process_index)
    return loader


def draws_as_first(together: int) -> None:
    """Have ranks that share a batch draw what the first of them would draw; all ranks call it.

    Args:
        together: how many share one.
    """
    if together == 1:
        return
    is_gpu = torch.cuda.is_available()
    mine = random.getstate(), np.random.get_state(), torch.get_rng_state(), is_gpu and torch.cuda.get_rng_state()
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, mine)
    first = states[dist.get_rank() // together * together]
    random.setstate(first[0])
    np.random.set_state(first[1])
    torch.set_rng_state(first[2])
    if is_gpu:
        torch.cuda.set_rng_state(first[3])


def _is_of_tensors(data: Any) -> bool:
    try:
        recursively_apply(lambda tensor: tensor, data, error_on_other_type=True)
    except TypeError:
        return False
    return True
