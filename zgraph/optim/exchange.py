"""Whole matrices for each rank's share of the work, and the results back to where their rows lie.

Matrices travel in rounds; in each, an owner gets as many as fit the limit. While a round is worked on, the next one
comes and the last one's results go back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from zgraph.errors import UsageError
from zgraph.optim.shares import Matrix, Round, rounds
from zgraph.runtime.shards import ShardStore

Span = tuple[int, slice]
"""The number of a matrix, and some of its rows."""


class Team:
    """The ranks that hold the shards of a model, and exchange matrices.

    Args:
        store: the model's parameters at rest.
    """

    def __init__(self, store: ShardStore) -> None:
        assert store.mesh is not None
        self.group = store.mesh.get_group(store.mesh.ndim - 1)
        self.rank, self.num_ranks, self.device, self.peers = store.shard, store.num_shards, store.device, store.peers

    def agree(self, names: Sequence[str], are_due: Sequence[bool]) -> None:
        """Check that the same parameters have a gradient on all ranks.

        Raises:
            UsageError: on every rank, with the names of those that differ.
        """
        due = torch.tensor(are_due, dtype=torch.int32, device=self.device)
        both = torch.stack([due, 1 - due])
        self.wait(dist.all_reduce(both, dist.ReduceOp.MAX, group=self.group, async_op=True), "parameters to update")
        if differing := [
            name for name, (some, not_all) in zip(names, both.T.tolist(), strict=True) if some and not_all
        ]:
            raise UsageError(
                f"some ranks have a gradient of {', '.join(differing)}, and some have none: Muon updates whole "
                "matrices, so run the same modules on all ranks before each step"
            )

    def all_to_all(self, sent: torch.Tensor, counts: Sequence[int], wanted: Sequence[int]) -> Arriving:
        """Begin to send `counts[r]` elements of `sent` to each rank r, and to receive `wanted[r]` from it."""
        made = sent.new_empty(sum(wanted))
        work = dist.all_to_all_single(made, sent, [*wanted], [*counts], group=self.group, async_op=True)
        return Arriving(self, work, sent, made)

    def wait(self, work: dist.Work | None, what: str) -> None:
        """Wait for a collective. Raises PeerError if a rank failed meanwhile."""
        assert work is not None
        if self.peers is not None:
            self.peers.wait(work, what)
        else:
            work.wait()


@dataclass
class Arriving:
    """An all-to-all under way. What is sent must not be freed before it is over."""

    team: Team
    work: dist.Work | None
    sent: torch.Tensor
    made: torch.Tensor

    def wait(self) -> torch.Tensor:
        """What came, the ranks' parts in their order."""
        self.team.wait(self.work, "matrices of Muon")
        return self.made


Give = Callable[[int], torch.Tensor]
Work = Callable[[int, torch.Tensor], torch.Tensor]
Take = Callable[[int, torch.Tensor], None]


class Exchange:
    """Work on whole matrices, each on one rank.

    Args:
        team: the ranks.
        matrices: the same on all of them.
        dtype: in which they travel and are worked on.
        max_bytes: of the whole matrices that a rank gets in one round. Up to six times as much is alive.
        give: for the number of a matrix, the rows that this rank holds; called once for each.
        work: for the number of a matrix and the whole, what becomes of it, of the same shape.
        take: for the number of a matrix, called with the rows of the result that this rank holds.
    """

    def __init__(
        self,
        team: Team,
        matrices: Sequence[Matrix],
        dtype: torch.dtype,
        max_bytes: int,
        give: Give,
        work: Work,
        take: Take,
    ) -> None:
        self.team, self.matrices, self.dtype = team, matrices, dtype
        self.give, self.work, self.take = give, work, take
        self.rounds = rounds(matrices, team.num_ranks, max_bytes // dtype.itemsize)
        self._coming: list[Arriving] = []

    def begin(self) -> None:
        """Have the first round come."""
        self._coming = [self._gather(each) for each in self.rounds[:1]]

    def finish(self) -> None:
        """Work on all rounds, and take the results."""
        going: list[tuple[Round, Arriving]] = []
        for at, each in enumerate(self.rounds):
            self._coming += [self._gather(following) for following in self.rounds[at + 1 : at + 2]]
            wholes = self._wholes(each, self._coming.pop(0).wait())
            going.append((each, self._scatter(each, [self.work(n, whole) for n, whole in wholes])))
            del wholes
            if len(going) > 1:
                self._deliver(*going.pop(0))
        for last in going:
            self._deliver(*last)

    def _given(self, number: int, rank: int, owner: int) -> slice:
        """The rows that a rank sends to the owner of a matrix: one that has all of it asks nobody."""
        matrix = self.matrices[number]
        return matrix.span(rank, self.team.num_ranks) if matrix.is_sharded or rank == owner else slice(0, 0)

    def _taken(self, number: int, rank: int) -> slice:
        """The rows of the result that a rank gets."""
        return self.matrices[number].span(rank, self.team.num_ranks)

    def _gather(self, each: Round) -> Arriving:
        """Begin to bring a round's matrices to their owners."""
        me, everyone = self.team.rank, range(self.team.num_ranks)
        sent = [[(n, self._given(n, me, owner)) for n in each[owner]] for owner in everyone]
        wanted = [[(n, self._given(n, rank, me)) for n in each[me]] for rank in everyone]
        parts = (self.give(n)[: s.stop - s.start] for spans in sent for n, s in spans)
        return self._send(sent, parts, wanted)

    def _wholes(self, each: Round, made: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
        """This rank's matrices of a round."""
        me = self.team.rank
        spans = [(n, self._given(n, rank, me)) for rank in range(self.team.num_ranks) for n in each[me]]
        parts = [*zip(spans, self._split(made, spans), strict=True)]
        return [(n, torch.cat([part for (m, _), part in parts if m == n])) for n in each[me]]

    def _scatter(self, each: Round, results: Iterable[torch.Tensor]) -> Arriving:
        """Begin to send results back."""
        me, everyone = self.team.rank, range(self.team.num_ranks)
        found = dict(zip(each[me], results, strict=True))
        sent = [[(n, self._taken(n, rank)) for n in each[me]] for rank in everyone]
        wanted = [[(n, self._taken(n, me)) for n in numbers] for numbers in each]
        return self._send(sent, (found[n][s] for spans in sent for n, s in spans), wanted)

    def _deliver(self, each: Round, arriving: Arriving) -> None:
        spans = [(n, self._taken(n, self.team.rank)) for numbers in each for n in numbers]
        for (number, _), rows in zip(spans, self._split(arriving.wait(), spans), strict=True):
            self.take(number, rows)

    def _send(
        self, sent: Sequence[Sequence[Span]], parts: Iterable[torch.Tensor], wanted: Sequence[Sequence[Span]]
    ) -> Arriving:
        """Begin to send rows to each rank, and to receive rows from each.

        Args:
            sent: the spans for each rank.
            parts: the rows of each span, one after the other; each is copied before the next is asked for.
            wanted: the spans from each rank.
        """
        counts, coming = ([sum(map(self._numel, spans)) for spans in some] for some in (sent, wanted))
        made = torch.empty(sum(counts), dtype=self.dtype, device=self.team.device)
        places = self._split(made, [span for spans in sent for span in spans])
        for place, part in zip(places, parts, strict=True):
            place.copy_(part)
        return self.team.all_to_all(made, counts, coming)

    def _numel(self, span: Span) -> int:
        number, rows = span
        return int(rows.stop - rows.start) * self.matrices[number].columns

    def _split(self, made: torch.Tensor, spans: Sequence[Span]) -> list[torch.Tensor]:
        """The rows of each span, [rows, columns]."""
        parts = torch.split(made, [self._numel(span) for span in spans])
        return [p.view(-1, self.matrices[n].columns) for p, (n, _) in zip(parts, spans, strict=True)]
