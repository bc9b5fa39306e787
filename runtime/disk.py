"""A file that holds optimizer states: mapped into memory, and read and written past the page cache where that helps.

Mapped, the states are tensors like any other, and small ones stay in the host's memory. Above what the kernel leaves
unwritten there, each step waits for pages of the one before to be written, one page fault after the other; direct
access moves whole pieces between the disk and blocks of our own instead (`man 2 open`, O_DIRECT).
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future as Promise
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Literal

import torch

from zgraph.errors import OffloadError
from zgraph.runtime.host import PAGE_BYTES, Copy, HostPool, whole_pages

Access = Literal["auto", "mapped", "direct"]

UNWRITTEN_SHARE = 0.1
"""The part of its free memory that Linux lets fill with what is not written yet, before it holds up who writes more
(vm.dirty_background_ratio)."""

_serial = count()


class DiskFile:
    """A file that tensors are cut from. It has no name, so that nothing is left behind.

    Args:
        folder: where it is; made if it is missing.
        num_bytes: of all tensors.
        num_tensors: how many.
        access: "direct" past the page cache, or "mapped". "auto" is direct where the file is larger than what the
            kernel leaves unwritten, and its file system can.
        free_bytes: of the host's memory, for this file.

    Raises:
        OffloadError: the folder cannot be written to, the disk has no room, or its file system knows no direct access
            and that was asked for.
    """

    def __init__(self, folder: Path, num_bytes: int, num_tensors: int, access: Access, free_bytes: int) -> None:
        self.folder = folder
        size = num_bytes + PAGE_BYTES * num_tensors
        path = folder / f"zgraph-{os.getpid()}-{next(_serial)}.state"
        self._direct: int | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free
            if size > free:
                raise OffloadError(
                    f"AdamW's moments need {size:,} bytes in {folder}, but only {free:,} are free there; free some, or "
                    "name a folder on another disk"
                )
            with path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(size, 1))
            self._bytes = torch.from_file(str(path), shared=True, size=max(size, 1), dtype=torch.uint8)
            if access == "direct" or (access == "auto" and size > UNWRITTEN_SHARE * free_bytes):
                self._open_directly(path, must=access == "direct")
        except OSError as error:
            raise OffloadError(
                f"cannot keep AdamW's moments in {folder}: {error.strerror}; name another folder"
            ) from None
        finally:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        self._next = 0
        self._readers, self._writers = ThreadPoolExecutor(1, "zgraph-reads"), ThreadPoolExecutor(1, "zgraph-writes")

    def _open_directly(self, path: Path, *, must: bool) -> None:
        try:
            self._direct = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:
            if must:
                raise OffloadError(
                    f"the file system of {self.folder} knows no direct access; name a folder on a local disk, or take "
                    'access="mapped"'
                ) from None

    def __del__(self) -> None:
        if getattr(self, "_direct", None) is not None:
            os.close(self._direct)  # type: ignore[arg-type]

    @property
    def is_direct(self) -> bool:
        """Whether `read` and `write` move the tensors' bytes, rather than whoever touches them."""
        return self._direct is not None

    def zeros(self, like: torch.Tensor) -> torch.Tensor:
        """The next tensor of the file, with another's shape and dtype.

        Raises:
            OffloadError: there are more tensors than were announced.
        """
        if self._next + like.nbytes > len(self._bytes):
            raise OffloadError("parameters were added to the optimizer, for which its file on disk has no room")
        part = _as(self._bytes[self._next :], like)
        self._next += whole_pages(like.nbytes)
        return part  # a new file reads as zeros

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in this file."""
        return 0 <= tensor.data_ptr() - self._bytes.data_ptr() < len(self._bytes)

    def read(self, tensor: torch.Tensor, pool: HostPool) -> tuple[torch.Tensor, Copy]:
        """Begin to bring a dense tensor of the file, or a part that begins at a page, to a block of the host's memory.

        Args:
            tensor: the tensor to read.
            pool: where the block comes from.

        Returns:
            The tensor that will hold the same numbers, and the copy to wait for, which raises OffloadError if the disk
            fails.
        """
        block = pool.empty((whole_pages(tensor.nbytes),), torch.uint8)
        copy = self._submit(self._readers, os.preadv, tensor, block)
        return _as(block, tensor), copy

    def write(self, tensor: torch.Tensor, block: torch.Tensor, after: Copy | None = None) -> Copy:
        """Begin to take back what `read` gave, `after` a copy into it is over."""
        return self._submit(self._writers, os.pwritev, tensor, block, after)

    def _submit(
        self,
        threads: ThreadPoolExecutor,
        move: Callable[[int, list[memoryview], int], int],
        tensor: torch.Tensor,
        block: torch.Tensor,
        after: Copy | None = None,
    ) -> Copy:
        offset = tensor.data_ptr() - self._bytes.data_ptr()
        num_bytes = whole_pages(tensor.nbytes)
        assert offset % PAGE_BYTES == block.data_ptr() % PAGE_BYTES == 0, "not where direct access can begin"
        assert self._direct is not None
        file = self._direct

        def run() -> None:
            if after is not None:
                after.synchronize()
            window = memoryview((ctypes.c_char * num_bytes).from_address(block.data_ptr())).cast("B")
            done = 0
            while done < num_bytes:
                try:
                    moved = move(file, [window[done:]], offset + done)
                except OSError as error:
                    raise OffloadError(
                        f"the disk of {self.folder} failed under AdamW's moments: {error.strerror}; go on from the "
                        "last checkpoint, with a folder on another disk"
                    ) from None
                assert moved > 0, "the file ends before the tensor"
                done += moved

        promise: Promise[None] = threads.submit(run)
        return Copy(promise)


def _as(block: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A block's bytes with another tensor's shape and dtype."""
    return block[: like.nbytes].view(like.dtype).view(like.size())
