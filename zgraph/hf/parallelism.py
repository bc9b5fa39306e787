"""Ranks that compute together, as TrainingArguments and accelerate's `ParallelismConfig` say how many."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from zgraph.errors import ConfigError

VARIABLE = "ACCELERATE_USE_PARALLELISM_CONFIG"


class Together(NamedTuple):
    """Ranks along each axis along which they compute together, and what says so.

    Args:
        tensor, context, expert: how many; 1 where nothing asks for more.
        copies: ranks that hold the same shard.
        said_by: the argument's name for each of these.
    """

    tensor: int = 1
    context: int = 1
    expert: int = 1
    copies: int = 1
    said_by: Mapping[str, str] = {}


def asked_together(args: Any, world_size: int) -> Together:
    """The ranks that TrainingArguments, their `parallelism_config` or `accelerate launch` want together.

    Args:
        args: TrainingArguments of any class.
        world_size: all ranks.

    Raises:
        ConfigError: two of them differ, or the sizes do not fit the ranks; the error has all problems.
    """
    own = {axis: getattr(args, f"{axis}_parallel", 1) for axis in ("tensor", "context", "expert")}
    problems = [
        f"{axis}_parallel: it must be a number of ranks, 1 or more, not {size!r}"
        for axis, size in own.items()
        if isinstance(size, bool) or not isinstance(size, int) or size < 1
    ]
    if problems:
        raise ConfigError(problems)
    said_by = {axis: f"{axis}_parallel" for axis, size in own.items() if size > 1}
    theirs = by_parallelism_config(getattr(args, "parallelism_config", None), world_size)
    for axis, size in zip(("tensor", "context"), (theirs.tensor, theirs.context), strict=True):
        if axis in said_by and size not in (1, own[axis]):
            problems.append(f"{axis}_parallel: it is {own[axis]}, and {size} by parallelism_config; give one of them")
        elif size > 1:
            own[axis], said_by[axis] = size, theirs.said_by[axis]
    if problems:
        raise ConfigError(problems)
    return Together(**own, copies=theirs.copies, said_by=said_by)


def by_parallelism_config(given: Any, num_ranks: int) -> Together:
    """The ranks that accelerate's `ParallelismConfig` wants together; of `accelerate launch`, where none is given.

    Its `cp_size` and `sp_size` both cut sequences: here by all-to-all of heads, whichever backend it names.

    Raises:
        ConfigError: the sizes do not fit the ranks, or each other; the error has all problems.
    """
    if given is None:
        if os.environ.get(VARIABLE, "false").lower() not in ("1", "true", "yes"):
            return Together()
        from accelerate.parallelism_config import ParallelismConfig

        given = ParallelismConfig()
    tensor, context = given.tp_size, given.cp_size * given.sp_size
    copies, shards = given.dp_replicate_size, given.dp_shard_size
    problems = []
    data = num_ranks // (tensor * context)
    if num_ranks % (tensor * context):
        problems.append(
            f"parallelism_config: {num_ranks} ranks are no multiple of tp_size x cp_size x sp_size = {tensor * context}"
        )
    elif copies * shards not in (1, data):
        problems.append(
            f"parallelism_config: dp_replicate_size x dp_shard_size is {copies} x {shards}, and {data} ranks have "
            "batches of their own; leave both out, which shards over all of them"
        )
    if copies > 1 and tensor * context > 1:
        problems.append(
            "parallelism_config.dp_replicate_size: where ranks compute together, all others shard; leave it out"
        )
    if problems:
        raise ConfigError(problems)
    said_by = {"tensor": "parallelism_config.tp_size"}
    said_by["context"] = f"parallelism_config.{'sp_size' if given.sp_size > 1 else 'cp_size'}"
    return Together(tensor, context, copies=copies, said_by=said_by)


@contextmanager
def unseen() -> Iterator[None]:
    """Hide from accelerate what `accelerate launch` says of ranks that compute together: it would do the same."""
    given = os.environ.pop(VARIABLE, None)
    try:
        yield
    finally:
        if given is not None:
            os.environ[VARIABLE] = given
