"""Files that are written past the page cache, where that can be."""

from __future__ import annotations

import os
import random
import zlib
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from zgraph.engine.checkpoint import direct
from zgraph.engine.checkpoint.direct import DirectFile
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


class Short:
    """A file that takes half of what it is given, twice, as one on a disk that is almost full."""

    def __init__(self, file: Any) -> None:
        self._file, self._left = file, 2

    def write(self, part: memoryview) -> int:
        self._left -= 1
        count: int = self._file.write(part[: len(part) // 2 + 1] if self._left >= 0 else part)
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def test_what_was_cut_short_goes_on_where_it_was(tmp_path: Path) -> None:
    held = random.Random(0).randbytes(4 << 20)
    with DirectFile(tmp_path / "file") as file:
        file._end_direct()  # so that a part of a block can be written
        file._file = Short(file._file)  # type: ignore[assignment]
        file.write(memoryview(held))
        file.finish()
    assert (tmp_path / "file").read_bytes() == held


def test_a_disk_that_is_full_is_an_error(tmp_path: Path) -> None:
    full = OSError(28, "No space left on device")
    with patch.object(direct.os, "open", side_effect=full), pytest.raises(OSError, match="No space left"):
        write_parts(tmp_path / "file", iter([memoryview(b"x")]))
    with pytest.raises(OSError, match="No space left"):
        write_parts(Path("/dev/full"), iter([memoryview(b"x" * 5000)]))
