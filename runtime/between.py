"""Means and messages between replicas of an elastic job, over a group of one generation.

The sum goes in the order of the replicas, whatever the network: each rank adds up a part of what all give, and all
gather the parts. So a mean is the same to the last bit on all replicas, and in any run with the same gradients.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from zgraph.bridge.private_runtime import Messenger, all_to_all, gather_parts, messenger
from zgraph.runtime.pulse import Line

PIECE_NUMEL = 1 << 22
"""Numbers that are sent at a time: 16 MB in fp32."""
PIECE_BYTES = 1 << 24
DAY_S = 86_400.0
_FIRST_NAP, _LONGEST_NAP, _ASK_S = 2e-5, 1e-3, 0.75


class BrokenError(Exception):
    """Communication between replicas that cannot be finished in this generation. Nobody but `Elastic` sees it."""


class Between:
    """Ranks with the same shard in the replicas of one generation, connected over gloo.

    Args:
        line: to the store where they meet.
        name: of this group, the same on all and used for no other.
        index, size: of this rank among them.
        problem: why they cannot go on; empty while they can.
        limit_s: for each wait.

    Raises:
        BrokenError: they do not meet.
    """

    def __init__(
        self, line: Line, name: str, index: int, size: int, problem: Callable[[], str], limit_s: float
    ) -> None:
        self.index, self.size, self.problem, self.limit_s = index, size, problem, limit_s
        self.sent_bytes = 0
        self._group: Messenger | None = None
        if size > 1:
            found: list[Messenger | Exception] = []

            def make() -> None:
                try:
                    later = timedelta(
                        seconds=min(2 * limit_s + 10, DAY_S)
                    )  # who waits here gives up first, and says so
                    found.append(messenger(line.connect(), name, index, size, later))
                except RuntimeError as error:
                    found.append(error)

            thread = threading.Thread(target=make, name="zgraph-elastic-connect", daemon=True)
            thread.start()
            self._watch(lambda nap: _has_ended(thread, nap), "the replicas to connect")
            if isinstance(found[0], Exception):
                raise BrokenError(f"the replicas could not connect: {found[0]}"[:500])
            self._group = found[0]

    def mean(self, pack: Callable[[int, int], torch.Tensor], numel: int) -> torch.Tensor:
        """The mean over the replicas of so many numbers, [numel] in the dtype of what is packed, on the host.

        Args:
            pack: makes this rank's numbers from one place to another, piece by piece; a new tensor each time.
            numel: how many there are.

        Raises:
            BrokenError: a replica is gone, or does not come.
        """
        parts: list[torch.Tensor] = []
        for begin in range(0, numel, PIECE_NUMEL):
            piece = pack(begin, min(begin + PIECE_NUMEL, numel))
            parts.append(self._mean(piece) if self._group is not None else piece)
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def of_first(self, pack: Callable[[int, int], torch.Tensor], num_bytes: int) -> torch.Tensor:
        """Bytes of the first replica on all, [num_bytes] on the host: each hands on a part of them to the others.

        Args:
            pack: makes the bytes from one place to another; a new tensor each time. Asked on the first replica.
            num_bytes: how many there are.

        Raises:
            BrokenError: a replica is gone, or does not come.
        """
        parts = [torch.empty(0, dtype=torch.uint8)]
        for begin in range(0, num_bytes if self._group is not None else 0, PIECE_BYTES):
            end = min(begin + PIECE_BYTES, num_bytes)
            piece = pack(begin, end) if self.index == 0 else torch.zeros(end - begin, dtype=torch.uint8)
            parts.append(self._shared(piece, lambda rows: rows[0], "buffers"))
        return torch.cat(parts)

    def _mean(self, piece: torch.Tensor) -> torch.Tensor:
        def mean(rows: torch.Tensor) -> torch.Tensor:
            for row in rows[1:]:
                rows[0].add_(row)
            return rows[0].div_(self.size)

        return self._shared(piece, mean, "gradients")

    def _shared(self, piece: torch.Tensor, combine: Callable[[torch.Tensor], torch.Tensor], what: str) -> torch.Tensor:
        """The combination of the pieces of all: each rank combines a part, [replicas, numbers], and all gather them."""
        group = self._group
        assert group is not None
        chunk = -(-piece.numel() // self.size)
        given = torch.nn.functional.pad(piece, (0, chunk * self.size - piece.numel()))
        came, whole = torch.empty_like(given), torch.empty_like(given)
        self._wait(lambda: all_to_all(group, came, given), what)
        own = combine(came.view(self.size, chunk))
        self._wait(lambda: gather_parts(group, whole, own), what)
        self.sent_bytes += 2 * (self.size - 1) * own.nbytes
        return whole[: piece.numel()]

    def send(self, tensor: torch.Tensor, to: int) -> None:
        """Send a contiguous tensor of the host to a replica's twin. Raises BrokenError."""
        group = self._group
        assert group is not None
        self._wait(lambda: _Aside(group.send([tensor], to, 0)), "a twin to take this state")
        self.sent_bytes += tensor.nbytes

    def receive(self, tensor: torch.Tensor, source: int) -> None:
        """Receive into a contiguous tensor of the host. Raises BrokenError."""
        group = self._group
        assert group is not None
        self._wait(lambda: _Aside(group.recv([tensor], source, 0)), "the state of a twin")

    def _wait(self, begin: Callable[[], dist.Work | _Aside], what: str) -> None:
        try:
            work = begin()
            try:
                self._watch(lambda nap: _is_over(work, nap), what)
            except BrokenError:
                _let_go(work, self._group)
                raise
            work.wait()
        except RuntimeError as error:
            raise BrokenError(f"{what}: {str(error).splitlines()[0]}"[:500]) from None

    def _watch(self, is_done: Callable[[float], bool], what: str) -> None:
        until, nap, asked = time.monotonic() + self.limit_s, _FIRST_NAP, time.monotonic()
        while not is_done(nap):
            nap = min(nap * 1.5, _LONGEST_NAP)
            if (now := time.monotonic()) - asked > _ASK_S:
                asked = now
                if problem := self.problem():
                    raise BrokenError(problem)
                if now > until:
                    raise BrokenError(f"{LATE}: {what} took longer than {self.limit_s:g} s")

    def close(self) -> None:
        """Let the group go."""
        _let_go(None, self._group)
        self._group = None


LATE = "not all came in time"
"""How a problem begins that is a limit alone: nobody is known to have ended."""


def _has_ended(thread: threading.Thread, nap: float) -> bool:
    thread.join(nap)
    return not thread.is_alive()


class _Aside(threading.Thread):
    """Waits for a message: gloo does not tell whether one is over."""

    def __init__(self, work: dist.Work) -> None:
        super().__init__(name="zgraph-elastic-message", daemon=True)
        self._work = work
        self._error: RuntimeError | None = None
        self.start()

    def run(self) -> None:
        try:
            self._work.wait()
        except RuntimeError as error:
            self._error = error

    def is_completed(self) -> bool:
        return not self.is_alive()

    def wait(self) -> None:
        self.join()
        if self._error is not None:
            raise self._error


def _is_over(work: dist.Work | _Aside, nap: float) -> bool:
    if not work.is_completed():
        time.sleep(nap)
    return work.is_completed()


def _let_go(work: dist.Work | _Aside | None, group: object) -> None:
    """Hold what gloo still reads or writes until it has given up; the end of a group may wait, too."""
    held: list[object] = [group]

    def end() -> None:
        with suppress(RuntimeError):
            if work is not None:
                work.wait()
        held.clear()

    threading.Thread(target=end, name="zgraph-elastic-end", daemon=True).start()
