"""Choices of each rank before the ranks first communicate: made by all of them, or an error on all of them.

A search, a check of options or a file may fail on one rank alone. The others would wait for it where groups of ranks
are made, or where plans are handed round, which no heartbeat watches over. So they meet before that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from zgraph.bridge import private_runtime
from zgraph.environment import environment
from zgraph.runtime.heartbeat import heartbeat
from zgraph.runtime.meetings import Meetings
from zgraph.runtime.peers import unique_name_of

Meet = Callable[[str, str], None]
"""Waits until all ranks have come as far: from what they compare, and this rank's text of it."""


def alone(what: str, text: str) -> None:
    """Meeting of one rank."""


@contextmanager
def deciding(mesh: DeviceMesh | None) -> Iterator[Meet]:
    """Choices of each rank, in which all meet before they communicate, and at the end.

    Args:
        mesh: the ranks; None for all.

    Raises:
        PeerError: on the other ranks, at once, if one raises in here; it says what.
        PlanMismatchError: on all of them, if they have come with different texts.
    """
    ranks = _ranks(mesh)
    if len(ranks) < 2:
        yield alone
        return
    heart = heartbeat(private_runtime.store(), dist.get_rank())
    meetings = Meetings(heart, ranks, f"{unique_name_of(ranks)}/choices", environment().timeout_s)
    try:
        yield meetings.agree
    except BaseException as error:
        meetings.fail(error)
        raise
    meetings.agree("choices", "")


def _ranks(mesh: DeviceMesh | None) -> tuple[int, ...]:
    """The ranks that choose; none where this one is not among them, which is told elsewhere."""
    if not dist.is_initialized():
        return ()
    if not isinstance(mesh, DeviceMesh):
        return tuple(range(dist.get_world_size()))
    ranks = tuple(int(rank) for rank in mesh.mesh.flatten())
    return ranks if dist.get_rank() in ranks else ()
