"""Tensors of all ranks into files and back: what fails on one rank fails on all, with the same words."""

from __future__ import annotations

from collections.abc import Callable

from zgraph.engine.checkpoint.index import index_of
from zgraph.engine.checkpoint.ranks import Ranks, raise_together
from zgraph.engine.checkpoint.storage import Reader, Writer
from zgraph.engine.checkpoint.tensors import Tensors
from zgraph.errors import CheckpointError, ZgraphError


def write_shards(tensors: Tensors, writer: Writer, ranks: Ranks) -> None:
    """Write what each rank has of these tensors; all ranks call it.

    Ranks exchange a digest of the index each, and no more: all of them must have computed the same.

    Raises:
        CheckpointError: on all ranks, with what went wrong on any.
        PeerError: a rank is gone.
    """
    problem, digest = "", 0
    try:
        index = index_of(tensors, ranks.members)
        digest = index.computed()
        writer.write(index, tensors)
    except (OSError, RuntimeError, ZgraphError) as error:
        problem = str(error)
    told = ranks.gather((problem, digest))
    _raise("saved", {rank: said for rank, (said, _) in enumerate(told) if said})
    if other := [rank for rank, (_, found) in enumerate(told) if found != told[0][1]]:
        raise CheckpointError(
            f"the checkpoint was not saved: rank {other[0]} has tensors of other names, shapes or placements than the "
            "first rank; build model and optimizer alike on all of them"
        )
    _together("saved", ranks, lambda: writer.finish(index) if ranks.rank == 0 else None)


def read_shards(targets: Tensors, reader: Reader, ranks: Ranks) -> None:
    """Fill what each rank has of these tensors; all ranks call it.

    Raises:
        CheckpointError: on all ranks, with what went wrong on any.
        PeerError: a rank is gone.
    """
    _together("loaded", ranks, lambda: reader.fill(targets))


def _together(done: str, ranks: Ranks, action: Callable[[], None]) -> None:
    problem = ""
    try:
        action()
    except (OSError, RuntimeError, ZgraphError) as error:
        problem = str(error)
    _raise(done, {rank: said for rank, said in enumerate(ranks.gather(problem)) if said})


def _raise(done: str, problems: dict[int, str]) -> None:
    raise_together({rank: f"the checkpoint was not {done}: {said}" for rank, said in problems.items()})
