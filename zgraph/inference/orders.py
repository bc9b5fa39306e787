"""Steps over ranks that compute together: the first rank has the requests, and tells the others what to run.

Of a step they need no more than the arguments of its two programs: a token of each row, and a piece of one prompt.
These are integers of a fixed layout in one broadcast. Which tokens are chosen is the first rank's alone, also where
they are drawn. While nobody asks for anything, the others wait for a key of the job's store: without a limit of time,
and without polling.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from zgraph.errors import UsageError
from zgraph.inference.calls import Calls
from zgraph.inference.generation import Generator
from zgraph.options.parallel import AXIS
from zgraph.runtime.store_errors import store_errors

NO_ROW = -1
"""The row of a step without a piece of a prompt."""

FIRST_HAS_REQUESTS = (
    "of ranks that compute together the first has the requests, in a ContinuousBatch; call "
    "zgraph.inference.orders.follow on the others"
)

_WAKE, _END = "wake", "end"

PATIENCE_S = 3.5
"""How much longer than its neighbour does, the ranks listen to one that is silent, before they end: clients wait. With
what a neighbour takes to say so, a process that is stopped is named within ten seconds.
"""

Piece = tuple[torch.Tensor, torch.Tensor]
"""Tokens of a prompt and their places, int64 [1, chunk]."""


class Orders:
    """The integers of one step, the same on all ranks that compute together.

    Args:
        calls: the programs that are run.

    Attributes:
        head: whether the ranks rest from now on, whether there is a token of each row, and the row of the piece.
        cleared: rows to fill with zeros before all else.
        tokens, places: of each row, as of `Calls.decode`.
        piece: tokens and places of a piece of a prompt.
    """

    def __init__(self, calls: Calls) -> None:
        self.calls, self.peers = calls, calls.programs.session.peers
        self.peers.patience_s = PATIENCE_S
        self.group = calls.programs.ranks.axis_group(AXIS)
        rows, chunk = calls.num_rows, calls.chunk
        sizes = [3, rows, rows, rows, chunk, chunk]
        self._integers = torch.zeros(sum(sizes), dtype=torch.int64, device=calls.device)
        self.head, self.cleared, self.tokens, self.places, *piece = torch.split(self._integers, sizes)
        self.piece = piece[0][None], piece[1][None]
        self.num_rests = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of them."""
        return self._integers.nbytes

    def exchange(self) -> None:
        """Broadcast them from the first rank. Raises PeerError if another failed."""
        work = dist.broadcast(self._integers, group_src=0, group=self.group, async_op=True)
        self.peers.wait(work, "what the first rank says to run")

    def key(self, number: int) -> str:
        """The key of the store that ends a rest."""
        return f"{self.peers.name}/rest/{number}"


class Leader(Orders):
    """The first rank's end: what it runs, the others are told before. One thread at a time."""

    def __init__(self, calls: Calls) -> None:
        super().__init__(calls)
        self._rests = True

    def begin(self, tokens: torch.Tensor, places: torch.Tensor, decodes: bool, row: int, piece: Piece | None) -> None:
        """Tell what the step runs: `Calls.decode` if it `decodes`, then `Calls.fill` of a row, if there is a piece.

        Raises:
            PeerError: another rank failed.
        """
        if self._rests:
            self._say(_WAKE)
        self.head.copy_(torch.tensor([0, decodes, NO_ROW if piece is None else row]))
        self.tokens.copy_(tokens)
        self.places.copy_(places)
        if piece is not None:
            for own, given in zip(self.piece, piece, strict=True):
                own.copy_(given)
        self.exchange()
        self.cleared.zero_()

    def clear(self, row: int | None = None) -> None:
        """Fill a row of the cache with zeros, or all: here at once, on the others before the next step."""
        self.calls.clear(row)
        self.cleared[slice(None) if row is None else row] = 1

    def rest(self) -> None:
        """Let the others wait until the next step, however long. Raises PeerError if another rank failed."""
        if not self._rests:
            self.head.copy_(torch.tensor([1, 0, NO_ROW]))
            self.exchange()
            self._rests = True

    def end(self) -> None:
        """Let the others go: there is no further step. Raises PeerError if another rank failed."""
        self.rest()
        self._say(_END)

    def check(self) -> None:
        """Look whether the others are still there. Raises PeerError if one is not."""
        self.peers.check("the next request")

    def fail(self, error: BaseException) -> None:
        """Tell the others that no step can follow."""
        self.calls.programs.session.fail(error)

    def _say(self, word: str) -> None:
        """End a rest. The key of the one before is not needed: all have come through a step since."""
        with store_errors():
            self.peers.store.set(self.key(self.num_rests), word)
            if self.num_rests:
                self.peers.store.delete_key(self.key(self.num_rests - 1))
        self.num_rests += 1
        self._rests = False


@torch.no_grad()
def follow(generator: Generator) -> None:
    """Run what the first rank runs, until it ends: for the other ranks of `infer(tensor_parallel=N)`.

        batch = ContinuousBatch(inference) if rank == 0 else follow(inference)

    Args:
        generator: this rank's. The first has a `ContinuousBatch` of its own, and closes it at the end.

    Raises:
        UsageError: there are no ranks to follow, or this is the first.
        PeerError: another rank failed, or is gone.
    """
    calls = generator.calls
    if calls.is_first:
        raise UsageError(FIRST_HAS_REQUESTS)
    orders = Orders(calls)
    try:
        while _is_woken(orders):
            while not _obeyed(orders, generator):
                pass
    except BaseException as error:
        calls.programs.session.fail(error)
        raise


def _is_woken(orders: Orders) -> bool:
    """Wait for the end of a rest; whether a step follows."""
    word = orders.peers.told(orders.key(orders.num_rests), "the next request")
    orders.num_rests += 1
    return word == _WAKE


def _obeyed(orders: Orders, generator: Generator) -> bool:
    """Run a step; whether a rest follows instead."""
    orders.exchange()
    rests, decodes, row = orders.head.tolist()
    if rests:
        return True
    generator.programs.refresh()
    for cleared in orders.cleared.nonzero().flatten().tolist():
        orders.calls.clear(cleared)
    if decodes:
        orders.calls.decode(orders.tokens, orders.places)
    if row != NO_ROW:
        orders.calls.fill(row, *orders.piece)
    return False
