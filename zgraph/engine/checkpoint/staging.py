"""Memory on the host through which files of a checkpoint go to a thread that writes them while training goes on.

The bytes of files are copied into buffers of one size, one behind the other. Of buffers no more are made than a limit
allows, and they are used again. With fewer than all bytes need, whoever copies waits for those that have been written.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch

from zgraph.engine.checkpoint.files import bytes_of, header_of, in_order
from zgraph.environment import ranks_here
from zgraph.errors import CheckpointError
from zgraph.runtime.host import available_bytes
from zgraph.runtime.shards import settle_host_memory

PIECE_BYTES = 16 << 20
"""Of one buffer, unless the limit allows no two."""
SHARE = 0.5
"""Of the host's free memory that its ranks together take, where nobody has set a limit."""


class Staging:
    """Buffers in the host's memory.

    `most_bytes` is the most that there have been.
    """

    def __init__(self) -> None:
        self.most_bytes = 0
        self._free: list[torch.Tensor] = []
        self._made, self._limit, self._size, self._is_pinned = 0, 0, 0, False
        self._changed = threading.Condition()

    def allow(self, limit_bytes: int, *, is_pinned: bool) -> None:
        """Set the limit, while no buffer is in use.

        Args:
            limit_bytes: of all buffers together.
            is_pinned: whether a GPU copies into them.
        """
        size = min(PIECE_BYTES, max(limit_bytes // 2, 1))
        with self._changed:
            if (size, is_pinned) != (self._size, self._is_pinned):
                self._free.clear()
            self._size, self._is_pinned = size, is_pinned
            self._limit = max(limit_bytes // size, 1)
            del self._free[self._limit :]
            self._made = len(self._free)

    def take(self) -> torch.Tensor:
        """A buffer that nobody uses; waits until there is one."""
        with self._changed:
            while not self._free and self._made >= self._limit:
                self._changed.wait()
            if self._free:
                return self._free.pop()
            self._made += 1
            self.most_bytes = max(self.most_bytes, self._made * self._size)
        try:
            return torch.empty(self._size, dtype=torch.uint8, pin_memory=self._is_pinned)
        except BaseException:
            with self._changed:
                self._made -= 1
            raise

    def give(self, buffer: torch.Tensor) -> None:
        """Give a buffer back."""
        with self._changed:
            self._free.append(buffer)
            self._changed.notify()


class Piece(NamedTuple):
    """The next bytes of a file, in a buffer; the last of the file, or not."""

    buffer: torch.Tensor
    num_bytes: int
    is_last: bool


class Pipe:
    """Files on their way from the thread that has the tensors to the one that writes.

    Args:
        staging: buffers to take.
    """

    def __init__(self, staging: Staging) -> None:
        self._staging = staging
        self._queue: SimpleQueue[Piece | str] = SimpleQueue()

    # --- the thread that has the tensors -----------------------------------------------------------------------------

    @torch.no_grad()
    def fill(self, files: Mapping[Path, list[str]], tensors: Mapping[str, torch.Tensor]) -> None:
        """Send the bytes of files; returns when all are in buffers or in files.

        Args:
            files: and the names of the tensors in each.
            tensors: as they are now.
        """
        settle_host_memory()
        for names in files.values():
            ordered = in_order({name: tensors[name] for name in names})
            head = torch.frombuffer(bytearray(header_of(ordered)), dtype=torch.uint8)
            self._send(head, *(bytes_of(tensor) for tensor in ordered.values() if tensor.numel()))

    def _send(self, *parts: torch.Tensor) -> None:
        buffer, filled = self._staging.take(), 0
        for part in parts:
            at = 0
            while at < len(part):
                if filled == len(buffer):
                    self._queue.put(Piece(buffer, filled, is_last=False))
                    buffer, filled = self._staging.take(), 0
                count = min(len(part) - at, len(buffer) - filled)
                buffer[filled : filled + count].copy_(part[at : at + count])
                at, filled = at + count, filled + count
        self._queue.put(Piece(buffer, filled, is_last=True))

    def end(self, problem: str) -> None:
        """Say that nothing comes any more, and what went wrong; nothing if all went well."""
        self._queue.put(problem)

    # --- the thread that writes --------------------------------------------------------------------------------------

    def parts(self) -> Generator[memoryview]:
        """The bytes of the next file. A part is there until the next is asked for.

        Raises:
            CheckpointError: the other thread could not send them.
        """
        is_last = False
        while not is_last:
            piece = self._queue.get()
            if not isinstance(piece, Piece):
                self.end(piece)  # for `finish`
                raise CheckpointError(piece or "a file ends before its last part")
            is_last = piece.is_last
            try:
                numbers: Any = piece.buffer.numpy()
                yield memoryview(numbers)[: piece.num_bytes]
            finally:
                self._staging.give(piece.buffer)

    def finish(self) -> None:
        """Wait for the end, and give back what has not been written.

        Raises:
            CheckpointError: something went wrong in the other thread.
        """
        while isinstance(piece := self._queue.get(), Piece):
            self._staging.give(piece.buffer)
        if piece:
            raise CheckpointError(piece)


def usual_limit() -> int:
    """Bytes that a rank may take where nobody has set a limit: its part of half of what the host has free."""
    return max(int(available_bytes() * SHARE) // max(ranks_here(), 1), 2 * PIECE_BYTES)
