"""Collectives on CPUs: gloo's connections, with a schedule of our own on top.

gloo's all-gather copies through a hidden buffer, and its reduce-scatter sends twice what it must. A receiver there asks
for data with a small message, which queues behind what its own side is sending on that connection: an exchange may
end up running one direction after the other. So each direction has separate connections here, receives are posted
before sends, and everything is sent from and received into the memory where it belongs.

Ranks on several hosts cross between hosts first and share within the host afterwards (the other way round when they
reduce), so that every byte crosses the slow link once. Where each host has all shards, gathers stay within it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial

import torch

from zgraph.bridge.private_runtime import JOIN_S, Store, messenger
from zgraph.bridge.sized_codes import sized_bytes
from zgraph.ir.codecs import HEAD_BYTES
from zgraph.runtime.hosts import Hosts
from zgraph.runtime.journal import Journal, Moved
from zgraph.runtime.transfers import Phases, Queue, Transfer, Works

CONNECT_TIMEOUT = timedelta(seconds=JOIN_S)
_AT_ONCE = timedelta(milliseconds=1)
_LAST_TAG = 2**31 - 1

Chunks = Sequence[torch.Tensor]


class Lane:
    """Runs collectives between ranks, one after the other, in a separate thread.

    Args:
        store: where the ranks meet.
        name: a name that is the same on all ranks and used for no other lane.
        rank: this rank, among those of the lane.
        hosts: which ranks share a host.
        each_has_all: tensors are sharded within each host, and each host has all shards; else they are sharded over
            all ranks.

    Raises:
        RuntimeError: a peer did not come within a minute.
    """

    def __init__(self, store: Store, name: str, rank: int, hosts: Hosts, *, each_has_all: bool = False) -> None:
        self.rank, self.hosts, self.each_has_all = rank, hosts, each_has_all
        self.num_ranks = sum(len(row) for row in hosts.rows)
        self.host, self.place = hosts.place(rank)
        self.local_ranks = hosts.rows[self.host]
        self.cross_host_ranks = tuple(row[self.place] for row in hosts.rows)
        self._upwards, self._downwards = (
            messenger(store, f"{name}/{way}", rank, self.num_ranks, CONNECT_TIMEOUT) for way in ("up", "down")
        )
        self.journal = Journal()
        self._queue = Queue()
        self._thread = threading.Thread(target=self._queue.serve, name=f"zgraph-{name}", daemon=True)
        self._thread.start()

    def watch(self) -> list[Transfer]:
        """Transfers that are handed over from now on, in their order, until `unwatch`."""
        found = self._queue.watched = list[Transfer]()
        return found

    def unwatch(self) -> None:
        """Keep no transfers any more."""
        self._queue.watched = None

    def close(self) -> None:
        """End the thread, also if it waits for a peer that will not answer. The lane is of no use afterwards."""
        if not self._thread.is_alive():
            return
        self._queue.close()
        self._thread.join(0.1)
        if self._thread.is_alive():
            for group in (self._upwards, self._downwards):
                with suppress(RuntimeError):  # a receive that times out makes gloo close the connections of its group
                    group.recv([torch.empty(1)], (self.rank + 1) % self.num_ranks, _LAST_TAG).wait(_AT_ONCE)
            self._thread.join()
        del self._upwards, self._downwards

    # --- collectives ---------------------------------------------------------------------------------------------

    def all_gather(self, *of: tuple[Chunks, torch.Tensor], moved: Moved | None = None, sized: bool = False) -> Transfer:
        """Fill the slots of tensors with what each rank has.

        Args:
            of: for each tensor one dense slot a shard, and what this rank has, as large. That is copied to its
                slot, and must not change until the transfer is over.
            moved: what this is; ranks on which it is not the same never receive one another's messages.
            sized: tensors are codes, of which only as many bytes travel as their heads say.
        """
        number = self.journal.enter("all-gather", [own.nbytes for _, own in of], moved)
        for slots, own in of:
            size = sized_bytes(own) if sized else own.numel()
            slots[self.shard][:size].copy_(own[:size])
        parts = [self._gathered(s, self.journal.tag(), self.journal.tag() if sized else 0) for s, _ in of]
        return self._queue.add(_together(parts), number)

    def reduce_scatter(self, *tensors: Chunks, moved: Moved | None = None, divisor: int = 0) -> Transfer:
        """The divided sums over the ranks of the chunks that are this rank's: in the order of the ranks of each host,
        then in the order of the hosts. They are the transfer's result.

        Args:
            tensors: for each tensor its chunks, one a shard. They must not change until the transfer is over.
            moved: as for `all_gather`.
            divisor: divisor of the sums; 0 takes the number of ranks, which makes them means.
        """
        number = self.journal.enter("reduce-scatter", [chunks[0].nbytes for chunks in tensors], moved)
        divisor = divisor or self.num_ranks
        return self._queue.add(_together([self._reduced(chunks, divisor) for chunks in tensors]), number)

    def all_reduce(self, chunks: Chunks, moved: Moved | None = None, divisor: int = 0) -> Transfer:
        """Put the divided sum over the ranks in the place of `chunks`: one dense tensor a rank, all of one size."""
        number = self.journal.enter("all-reduce", [chunks[0].nbytes], moved)
        tags = self.journal.tag(), self.journal.tag()
        return self._queue.add(_together([self._reduce_and_gather(chunks, divisor or self.num_ranks, *tags)]), number)

    def all_to_all(self, outs: Chunks, chunks: Chunks, moved: Moved | None = None) -> Transfer:
        """Fill the slots `outs`, one a rank, with what each rank has for this one among its `chunks`."""
        number = self.journal.enter("all-to-all", [chunks[0].nbytes], moved)
        outs[self.rank].copy_(chunks[self.rank])
        return self._queue.add(
            _together([self._swap_among(range(self.num_ranks), outs, chunks, self.journal.tag())]), number
        )

    def reduce_inside(self, chunks: Chunks, divisor: int, moved: Moved | None = None) -> Transfer:
        """The divided sum over this rank's row of the chunk that is this one's, as the transfer's result."""
        number = self.journal.enter("reduce-scatter", [chunks[0].nbytes], moved)
        return self._queue.add(_together([self._reduced_inside(chunks, divisor, self.journal.tag())]), number)

    def swap_outside(self, outs: Chunks, chunks: Chunks, moved: Moved | None = None) -> Transfer:
        """Fill the slots `outs`, one a row, with what each rank of this one's place has for this one."""
        number = self.journal.enter("all-to-all", [chunks[0].nbytes], moved)
        outs[self.host].copy_(chunks[self.host])
        return self._queue.add(
            _together([self._swap_among(self.cross_host_ranks, outs, chunks, self.journal.tag())]), number
        )

    def share_outside(self, slots: Chunks, own: torch.Tensor, moved: Moved | None = None) -> Transfer:
        """Fill the slots, one a row, with what each rank of this one's place has."""
        number = self.journal.enter("all-gather", [own.nbytes], moved)
        slots[self.host].copy_(own)
        share = self._share(self.cross_host_ranks, slots, self.journal.tag())
        return self._queue.add(_together([share]), number)

    @property
    def shard(self) -> int:
        """Which part of a sharded tensor is this rank's."""
        return self.place if self.each_has_all else self.rank

    def _gathered(self, slots: Chunks, count: int, of_bodies: int) -> Phases[torch.Tensor]:
        """A gather; with a number for messages of codes' bodies, of heads first, and then of as much as these say."""
        gather = partial(self._share, self.local_ranks) if self.each_has_all else self._gather
        if not of_bodies:
            return (yield from gather(slots, count))
        yield from gather([slot[:HEAD_BYTES] for slot in slots], count)
        return (yield from gather([slot[HEAD_BYTES : sized_bytes(slot)] for slot in slots], of_bodies))

    def _reduced(self, chunks: Chunks, divisor: int) -> Phases[torch.Tensor]:
        out = torch.empty_like(chunks[self.shard])
        if not self.each_has_all:
            return self._reduce(chunks, divisor, out, self.journal.tag())
        return self._reduce_copies(chunks, divisor, out, [self.journal.tag() for _ in range(3)])

    def _share(self, ranks: Sequence[int], slots: Chunks, count: int) -> Phases[torch.Tensor]:
        """A gather among `ranks`, one slot each."""
        own = slots[ranks.index(self.rank)]
        others = [(i, r) for i, r in enumerate(ranks) if r != self.rank]
        yield self._exchange(count, [(slots[i], r, 0) for i, r in others], [(own, r, 0) for _, r in others])
        return own

    def _swap_among(self, ranks: Sequence[int], outs: Chunks, chunks: Chunks, count: int) -> Phases[torch.Tensor]:
        """An all-to-all among `ranks`, a slot and a chunk each."""
        at = ranks.index(self.rank)
        others = [(i, r) for i, r in enumerate(ranks) if r != self.rank]
        yield self._exchange(count, [(outs[i], r, 0) for i, r in others], [(chunks[i], r, 0) for i, r in others])
        return outs[at]

    def _reduced_inside(self, chunks: Chunks, divisor: int, count: int) -> Phases[torch.Tensor]:
        """A sum within the row, which others of the same place do not add to."""
        out = torch.empty_like(chunks[self.place])
        total = yield from self._sum_of(self.local_ranks, _addends(chunks, divisor), out, count)
        return _divided(total, divisor)

    def _reduce_copies(self, chunks: Chunks, divisor: int, out: torch.Tensor, tags: list[int]) -> Phases[torch.Tensor]:
        """A sum within the host, then one over the hosts, each rank of one place summing a piece of it."""
        chunks = _addends(chunks, divisor)
        total = yield from self._sum_of(self.local_ranks, chunks, out, tags[0])
        pieces = torch.tensor_split(total, len(self.cross_host_ranks))
        summed = yield from self._sum_of(self.cross_host_ranks, pieces, torch.empty_like(pieces[self.host]), tags[1])
        pieces[self.host].copy_(summed)
        yield from self._share(self.cross_host_ranks, pieces, tags[2])
        return _divided(total, divisor)

    def _sum_of(
        self, ranks: Sequence[int], pieces: Chunks, out: torch.Tensor | None, count: int
    ) -> Phases[torch.Tensor]:
        """The sum over `ranks` of the piece that is this one's, in `out` or in new memory."""
        at, spare = ranks.index(self.rank), iter([out])
        own = pieces[at]
        parts = [own if i == at else next(spare, None) for i in range(len(ranks))]
        landed = [torch.empty_like(own) if p is None else p for p in parts]
        others = [(i, r) for i, r in enumerate(ranks) if r != self.rank]
        yield self._exchange(count, [(landed[i], r, 0) for i, r in others], [(pieces[i], r, 0) for i, r in others])
        return _sum(landed, at)

    def _gather(self, slots: Chunks, count: int) -> Phases[torch.Tensor]:
        others = [r for r in (*self.cross_host_ranks, *self.local_ranks) if r != self.rank]
        yield self._exchange(count, [(slots[r], r, 0) for r in others], [(slots[self.rank], r, 0) for r in others])
        local = [(r, p) for p, r in enumerate(self.local_ranks) if r != self.rank]
        rows = [row for h, row in enumerate(self.hosts.rows) if h != self.host]
        if local and rows:
            yield self._exchange(
                count,
                [(slots[row[p]], r, 1 + h) for r, p in local for h, row in enumerate(rows)],
                [(slots[row[self.place]], r, 1 + h) for r, _ in local for h, row in enumerate(rows)],
            )
        return slots[self.rank]

    def _reduce(self, chunks: Chunks, divisor: int, out: torch.Tensor | None, count: int) -> Phases[torch.Tensor]:
        """`out` is where what comes from the first peer lands, and in the end the sum or mean."""
        chunks, rows = _addends(chunks, divisor), self.hosts.rows

        def landing(like: torch.Tensor) -> torch.Tensor:
            nonlocal out
            taken, out = out, None
            return torch.empty_like(like) if taken is None else taken

        sums = [chunks[row[self.place]] for row in rows]
        if len(self.local_ranks) > 1:
            parts = [[own if r == self.rank else landing(own) for r in self.local_ranks] for own in sums]
            local = [(r, p) for p, r in enumerate(self.local_ranks) if r != self.rank]
            yield self._exchange(
                count,
                [(parts[h][p], r, 1 + h) for r, p in local for h in range(len(rows))],
                [(chunks[row[p]], r, 1 + h) for r, p in local for h, row in enumerate(rows)],
            )
            sums = [_sum(p, self.place) for p in parts]
            del parts
        total = sums[self.host]
        if len(rows) > 1:
            total = yield from self._sum_of(self.cross_host_ranks, sums, out, count)
        return _divided(total, divisor)

    def _reduce_and_gather(self, chunks: Chunks, divisor: int, first: int, second: int) -> Phases[torch.Tensor]:
        chunks[self.rank].copy_((yield from self._reduce(chunks, divisor, None, first)))
        return (yield from self._gather(chunks, second))

    # --- messages ------------------------------------------------------------------------------------------------

    def _exchange(
        self, count: int, receive: list[tuple[torch.Tensor, int, int]], send: list[tuple[torch.Tensor, int, int]]
    ) -> Works:
        """Post messages, each a tensor, the peer, and a number that tells messages of one pair in one collective apart.

        Args:
            count: the collective's number for its messages (`Journal.tag`).
            receive: where to put what comes.
            send: what goes.
        """
        num_tags = len(self.hosts.rows) + 1
        first = count % (_LAST_TAG // num_tags) * num_tags
        works: Works = []
        for tensor, peer, number in receive:
            if tensor.numel():
                group = self._upwards if peer < self.rank else self._downwards
                works.append(group.recv([tensor], peer, first + number))
        for tensor, peer, number in send:
            if tensor.numel():
                group = self._upwards if self.rank < peer else self._downwards
                works.append(group.send([tensor], peer, first + number))
        return works


def _together(parts: Sequence[Phases[torch.Tensor]]) -> Phases[list[torch.Tensor]]:
    """Collectives phase by phase side by side, and what each of them made."""
    made: dict[int, torch.Tensor] = {}
    while len(made) < len(parts):
        works: Works = []
        for number, part in enumerate(parts):
            if number not in made:
                try:
                    works += next(part)
                except StopIteration as end:
                    made[number] = end.value
        if works or len(made) < len(parts):
            yield works
    return [made[number] for number in range(len(parts))]


def _addends(chunks: Chunks, divisor: int) -> Chunks:
    """The chunks to sum. Those of fp16 are divided first where a mean is wanted, as their sum may overflow."""
    return [c / divisor for c in chunks] if divisor > 1 and chunks[0].dtype == torch.float16 else chunks


def _divided(total: torch.Tensor, divisor: int) -> torch.Tensor:
    return total if divisor == 1 or total.dtype == torch.float16 else total.div_(divisor)


def _sum(parts: Chunks, own: int) -> torch.Tensor:
    """The sum of two or more parts in their order. It takes the place of one of them, but not of the part `own`."""
    total = torch.add(parts[0], parts[1], out=parts[0 if own else 1])
    for part in parts[2:]:
        total.add_(part)
    return total
