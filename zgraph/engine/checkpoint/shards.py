"""Tensors of all ranks into files and back: what fails on one rank fails on all, with the same words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zgraph.engine.checkpoint.index import Index, index_of
from zgraph.engine.checkpoint.ranks import Ranks, raise_together
from zgraph.engine.checkpoint.storage import Reader, Writer
from zgraph.engine.checkpoint.tensors import Tensors
from zgraph.errors import CheckpointError, ZgraphError

Gather = Callable[[Any], list[Any]]
"""Gives what each rank has, of values that JSON has, in the order of the ranks."""


def write_shards(tensors: Tensors, writer: Writer, ranks: Ranks) -> None:
    """Write what each rank has of these tensors; all ranks call it.

    Raises:
        CheckpointError: on all ranks, with what went wrong on any.
        PeerError: a rank is gone.
    """

    def write() -> Index:
        index = index_of(tensors, ranks.members)
        writer.write(index, tensors)
        return index

    finish_shards(write, writer, ranks.gather)


def finish_shards(write: Callable[[], Index], writer: Writer, gather: Gather) -> None:
    """Write this rank's files, and the index when all ranks have written theirs; all ranks call it.

    Ranks exchange a digest of the index each, and no more: all of them must have computed the same.

    Args:
        write: writes the files, and gives the index.
        writer: of the files.
        gather: gives what each rank has.

    Raises:
        CheckpointError: on all ranks, with what went wrong on any.
        PeerError: a rank is gone.
    """
    problem, digest, index = "", 0, None
    try:
        index = write()
        digest = index.computed()
    except (OSError, RuntimeError, ZgraphError) as error:
        problem = str(error) or type(error).__name__
    told = gather((problem, digest))
    _raise("saved", {rank: said for rank, (said, _) in enumerate(told) if said})
    if other := [rank for rank, (_, found) in enumerate(told) if found != told[0][1]]:
        raise CheckpointError(
            f"the checkpoint was not saved: rank {other[0]} has tensors of other names, shapes or placements than the "
            "first rank; build model and optimizer alike on all of them"
        )
    _together("saved", gather, lambda: writer.finish(index) if writer.rank == 0 and index is not None else None)


def read_shards(targets: Tensors, reader: Reader, ranks: Ranks) -> None:
    """Fill what each rank has of these tensors; all ranks call it.

    Raises:
        CheckpointError: on all ranks, with what went wrong on any.
        PeerError: a rank is gone.
    """
    _together("loaded", ranks.gather, lambda: reader.fill(targets))


def _together(done: str, gather: Gather, action: Callable[[], None]) -> None:
    problem = ""
    try:
        action()
    except (OSError, RuntimeError, ZgraphError) as error:
        problem = str(error) or type(error).__name__
    _raise(done, {rank: said for rank, said in enumerate(gather(problem)) if said})


def _raise(done: str, problems: dict[int, str]) -> None:
    raise_together({rank: f"the checkpoint was not {done}: {said}" for rank, said in problems.items()})
