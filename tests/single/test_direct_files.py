"""Files that are written past the page cache, where that can be."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from zgraph.engine.checkpoint import direct
from zgraph.engine.checkpoint.checksums import CHUNK_BYTES
from zgraph.engine.checkpoint.direct import BLOCK_BYTES, DirectFile
from zgraph.engine.checkpoint.files import write_parts

SIZES = (0, 1, 4095, 4096, 4097, (4 << 20) - 1, 4 << 20, (4 << 20) + 1, (8 << 20) + 4096)


def pieces(held: bytes, seed: int) -> list[memoryview]:
    draw, found, at = random.Random(seed), list[memoryview](), 0
    while at < len(held):
        size = draw.choice((1, 8, 4096, 1 << 20, 5 << 20))
        found.append(memoryview(held)[at : at + size])
        at += size
    return found


@pytest.mark.parametrize("folder", ["disk", "memory"])
def test_what_is_written_is_there(tmp_path: Path, folder: str) -> None:
    home = tmp_path if folder == "disk" else Path("/dev/shm")
    path = home / f"zgraph-test-{os.getpid()}"
    try:
        for seed, size in enumerate(SIZES):
            held = random.Random(seed).randbytes(size)
            written = write_parts(path, iter(pieces(held, seed)))
            assert path.read_bytes() == held
            assert (written.num_bytes, written.checksum) == (size, zlib.crc32(held))
    finally:
        path.unlink()


def is_direct(file: Any) -> bool:
    return bool(fcntl.fcntl(file.fileno(), fcntl.F_GETFL) & os.O_DIRECT)


def takes_direct(path: Path) -> bool:
    """Whether the filesystem of a file takes the flag."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    except OSError:
        return False
    os.close(descriptor)
    path.unlink()
    return True


class Wrapped:
    """A file, and whether it was past the page cache at each write, as the system has it."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.was_direct: list[bool] = []

    def write(self, part: memoryview) -> int:
        self.was_direct.append(is_direct(self._file))
        count: int = self._write(part)
        return count

    def _write(self, part: memoryview) -> Any:
        return self._file.write(part)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class Short(Wrapped):
    """One that takes an odd part of what it is given, twice, as on a disk that is almost full."""

    def _write(self, part: memoryview) -> Any:
        if len(self.was_direct) > 2:
            return self._file.write(part)
        descriptor = self._file.fileno()
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)  # so that it can be cut anywhere
        count = self._file.write(part[: len(part) // 2 + 1])
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
        return count


class Picky(Wrapped):
    """One whose filesystem takes direct writes in multiples of 64 KiB alone."""

    def _write(self, part: memoryview) -> Any:
        if self.was_direct[-1] and len(part) % (64 << 10):
            raise OSError(errno.EINVAL, "Invalid argument")
        return self._file.write(part)


@pytest.mark.parametrize(
    ("kind", "num_bytes", "was_direct"),
    [
        (Wrapped, 2 * CHUNK_BYTES + 1, [True, True, False]),
        (Wrapped, CHUNK_BYTES + BLOCK_BYTES, [True, True]),
        (Short, 2 * CHUNK_BYTES, [True, False, False, False]),
        (Picky, CHUNK_BYTES + BLOCK_BYTES, [True, True, False]),
    ],
)
def test_writes_are_direct_while_the_filesystem_takes_them(
    tmp_path: Path, kind: type[Wrapped], num_bytes: int, was_direct: list[bool]
) -> None:
    """What was cut short, or refused for its size, goes on through the page cache, where it was."""
    if not takes_direct(tmp_path / "file"):
        pytest.skip("the filesystem of temporary files has no direct ones")
    held = random.Random(0).randbytes(num_bytes)
    with DirectFile(tmp_path / "file") as file:
        wrapped = kind(file._file)
        file._file = wrapped  # type: ignore[assignment]
        file.write(memoryview(held))
        file.finish()
    assert (tmp_path / "file").read_bytes() == held
    assert wrapped.was_direct == was_direct


def test_a_write_that_fails_for_another_reason_is_an_error(tmp_path: Path) -> None:
    def refuse(_: memoryview) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    with DirectFile(tmp_path / "file") as file:
        file._end_direct()
        with patch.object(file, "_file", SimpleNamespace(write=refuse)):
            file.write(memoryview(b"x"))
            with pytest.raises(OSError, match="Invalid argument"):
                file._flush()


def test_a_disk_that_is_full_is_an_error(tmp_path: Path) -> None:
    full = OSError(28, "No space left on device")
    with patch.object(direct.os, "open", side_effect=full), pytest.raises(OSError, match="No space left"):
        write_parts(tmp_path / "file", iter([memoryview(b"x")]))
    with pytest.raises(OSError, match="No space left"):
        write_parts(Path("/dev/full"), iter([memoryview(b"x" * 5000)]))
