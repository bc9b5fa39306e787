"""Loaders of other lengths on each rank: those that have run out go along until the last has, and add nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from zgraph.errors import UsageError
from zgraph.runtime import Session

T = TypeVar("T")


class _Loader(IntEnum):
    """Batches that a rank's loader has given."""

    EMPTY = 0
    OVER = 1
    HAS_MORE = 2


class Joined:
    """Context of `zgraph.join`.

    Args:
        session: of the model.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        if session.store.ranks.num_batches > session.num_ranks:
            raise UsageError(
                "ranks that share experts make one batch of theirs in each call, so that none of them can count for "
                "nothing: give them loaders of one length (drop_last=True), or leave expert_parallel= out"
            )

    @property
    def is_over(self) -> bool:
        """Whether this rank's own batches are over: the present one counts for nothing."""
        return self.session.adds_nothing

    def __call__(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches of a loader; when they are over, the last one again, until all ranks' are.

        A rank that never has a batch is given one of another rank's.

        Args:
            batches: of this rank. The ranks call it with loaders of the same kind.
        """
        own, last = iter(batches), cast(T, None)
        given = _Loader.EMPTY
        try:
            while True:
                try:
                    last, given = next(own), _Loader.HAS_MORE
                except StopIteration:
                    given = min(given, _Loader.OVER)
                ranks = self._told(given)
                if _Loader.HAS_MORE not in ranks:
                    return
                if _Loader.EMPTY in ranks:
                    last = self._shared(last, ranks.index(_Loader.HAS_MORE), given)
                self.session.adds_nothing = given is not _Loader.HAS_MORE
                yield last
        finally:
            self.session.adds_nothing = False

    def _told(self, given: _Loader) -> list[_Loader]:
        """Batches that every rank's loader has given."""
        if self.session.is_alone:
            return [given]
        words = torch.zeros(self.session.num_ranks, dtype=torch.int32, device=self.session.device)
        words[self.session.store.data_rank] = int(given)
        work = dist.all_reduce(words, group=self.session.group, async_op=True)
        self.session.peers.wait(work, "the others' word whether they have another batch")
        return [_Loader(word) for word in words.tolist()]

    def _shared(self, last: T, rank: int, given: _Loader) -> T:
        """This rank's batch, or that rank's where this one never had any."""
        packed: list[Any] = [last]
        dist.broadcast_object_list(packed, dist.get_global_rank(self.session.group, rank), self.session.group)
        return cast(T, packed[0]) if given is _Loader.EMPTY else last
