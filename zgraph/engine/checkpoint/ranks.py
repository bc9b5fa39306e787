"""All ranks of a run, agreeing on what went wrong: what fails on one of them is an error on each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from zgraph.bridge import private_runtime
from zgraph.errors import CheckpointError, ZgraphError
from zgraph.runtime import Session
from zgraph.runtime.asides import Aside
from zgraph.runtime.peers import Peers, unique_name

T = TypeVar("T")


class Ranks:
    """The ranks of a model, joined by a separate group when they first need one.

    Args:
        group: the process group that the model trains on; None for one process.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._world = group
        self.members = [0] if group is None else dist.get_process_group_ranks(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    @property
    def size(self) -> int:
        return len(self.members)

    @cached_property
    def _peers(self) -> Peers | None:
        if self._world is None or self.size == 1:
            return None
        return Peers(self._world, unique_name(self._world), torch.device("cpu"))

    @cached_property
    def group(self) -> dist.ProcessGroup | None:
        """The separate group, on processors; None for one process.

        Raises:
            PeerError: a rank is gone.
        """
        if self._peers is None:
            return None
        self._peers.agree("ranks of a checkpoint", "")  # connecting cannot be broken off: it begins when all have come
        with self.watched("the ranks of a checkpoint to join"):
            return private_runtime.joined(self.members, self._peers.name)

    def gather(self, value: T) -> list[T]:
        """The value of each rank.

        Raises:
            PeerError: a rank is gone.
        """
        if self.group is None:
            return [value]
        found: list[Any] = [None] * self.size
        with self.watched("a word from each rank"):
            dist.all_gather_object(found, value, self.group)
        return found

    def beside(self, what: str) -> Beside:
        """These ranks, for a thread beside training. All ranks ask for it in their main threads, in one order.

        Args:
            what: the threads agree about, for messages.
        """
        if self._world is None or self.size == 1:
            return Beside(None)
        return Beside(Aside(dist.get_rank(), tuple(self.members), unique_name(self._world), what))

    @contextmanager
    def watched(self, what: str) -> Iterator[None]:
        """Find out which rank is gone where communication in here fails.

        Args:
            what: is waited for.

        Raises:
            PeerError: a rank is gone, or the network is.
        """
        try:
            yield
        except RuntimeError as error:
            if self._peers is None:
                raise
            self._peers.blame(what, error)

    def together(self, action: Callable[[], T]) -> T:
        """The result of the action on this rank, if it succeeds on all of them.

        Raises:
            CheckpointError: it failed on some rank; the same on all of them.
        """
        result, problem = None, None
        try:
            result = action()
        except (OSError, ZgraphError) as error:
            problem = str(error)
        raise_together(dict(enumerate(self.gather(problem))))
        return result  # type: ignore[return-value]

    def first(self, action: Callable[[], T]) -> T:
        """The first rank's result of the action, on all ranks."""
        return self.gather(self.together(lambda: action() if self.rank == 0 else None))[0]  # type: ignore[return-value]


class Beside:
    """Ranks as a thread meets them beside training: through the store, without a collective.

    Args:
        aside: None for one process.
    """

    def __init__(self, aside: Aside | None) -> None:
        self._aside = aside

    def gather(self, value: Any) -> list[Any]:
        """The value of each rank, of values that JSON has.

        Raises:
            PeerError: a rank is gone.
        """
        if self._aside is None:
            return [value]
        return self._aside.gather(value)

    def check(self, what: str) -> None:
        """Raise PeerError if a rank is gone, for which this one waits for `what`."""
        if self._aside is not None:
            self._aside.check(what)


_RANKS: WeakKeyDictionary[Session, Ranks] = WeakKeyDictionary()


def ranks_of(session: Session) -> Ranks:
    """Those of a compiled model; the same whenever it is asked, as each has a separate group."""
    store = session.store
    group = dist.group.WORLD if store.ranks.num_model else store.group  # a mesh with a model axis is of all ranks
    return _RANKS.setdefault(session, Ranks(group))


def raise_together(problems: dict[int, str | None]) -> None:
    """Raise CheckpointError if a rank has a problem: once, what all of them say."""
    found = {rank: problem for rank, problem in problems.items() if problem is not None}
    if len(set(found.values())) == 1:
        raise CheckpointError(next(iter(found.values())))
    if found:
        raise CheckpointError("; ".join(f"rank {rank}: {problem}" for rank, problem in found.items()))
