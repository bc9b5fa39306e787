"""Writing a file past the page cache, where its filesystem can: at the disk's speed, and with memory left to others."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from zgraph.engine.checkpoint.checksums import CHUNK_BYTES

BLOCK_BYTES = 4096
"""Multiples of it, at places that are, too, go past the page cache."""


class DirectFile:
    """A new file to write from its beginning to its end.

    Args:
        path: of the file.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self._is_direct = True
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            descriptor = os.open(path, flags | os.O_DIRECT, 0o666)
        except OSError:  # a filesystem in memory, or on a network; what else is wrong is told again
            descriptor, self._is_direct = os.open(path, flags, 0o666), False
        self._file: BinaryIO = os.fdopen(descriptor, "wb", buffering=0)
        self._block, self._filled = mmap.mmap(-1, CHUNK_BYTES), 0

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        self._block.close()

    def write(self, part: memoryview) -> int:
        """Write bytes behind those before; how many there were. Raises OSError."""
        at = 0
        while at < len(part):
            count = min(len(part) - at, len(self._block) - self._filled)
            self._block[self._filled : self._filled + count] = part[at : at + count]
            at, self._filled = at + count, self._filled + count
            if self._filled == len(self._block):
                self._flush()
        return len(part)

    def finish(self) -> None:
        """Write what is left, and wait until all is on disk. Raises OSError."""
        if self._filled % BLOCK_BYTES:
            self._end_direct()
        self._flush()
        os.fsync(self._file.fileno())

    def _flush(self) -> None:
        done, filled, self._filled = 0, self._filled, 0
        with memoryview(self._block) as block:
            while done < filled:
                try:
                    done += self._file.write(block[done:filled])
                except OSError as error:
                    if error.errno != errno.EINVAL or not self._is_direct:
                        raise
                    self._end_direct()  # its filesystem takes the flag, and not each multiple of a block
                    continue
                if done < filled:  # cut short within a block, maybe: the rest need not begin at one
                    self._end_direct()

    def _end_direct(self) -> None:
        if self._is_direct:
            descriptor, self._is_direct = self._file.fileno(), False
            fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT)
