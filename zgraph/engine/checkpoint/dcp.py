"""Tensors of all ranks into files and back, by torch.distributed.checkpoint: what fails on one rank fails on all."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from zgraph.engine.checkpoint.ranks import Ranks, raise_together
from zgraph.engine.checkpoint.storage import Reader, Writer
from zgraph.engine.checkpoint.tensors import Tensors
from zgraph.errors import CheckpointError


def write_shards(tensors: Tensors, writer: Writer, ranks: Ranks) -> None:
    """Write what each rank has of these tensors; all ranks call it.

    Raises:
        CheckpointError: on all ranks, with what went wrong on any.
        PeerError: a rank is gone.
    """
    with _failing_alike("saved", ranks):
        save(tensors, storage_writer=writer, process_group=ranks.group, no_dist=ranks.size == 1)


def read_shards(targets: Tensors, reader: Reader, ranks: Ranks) -> None:
    """Fill what each rank has of these tensors; all ranks call it.

    Raises:
        CheckpointError: on all ranks, with what went wrong on any.
        PeerError: a rank is gone.
    """
    with _failing_alike("loaded", ranks):
        load(targets, storage_reader=reader, process_group=ranks.group, no_dist=ranks.size == 1)


@contextmanager
def _failing_alike(done: str, ranks: Ranks) -> Iterator[None]:
    """Context in which an error of dcp is raised as the same CheckpointError on all ranks."""
    try:
        with warnings.catch_warnings(), ranks.watched(f"a checkpoint to be {done}"):
            if not dist.is_initialized():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as error:
        raise_together({rank: f"the checkpoint was not {done}: {told}" for rank, (told, _) in error.failures.items()})
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint was not {done}: {error}") from None
