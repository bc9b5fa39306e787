"""Checksums of a checkpoint's files: CRC-32, which finds what disks and copies damage, and no one who means harm."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from zgraph.engine.checkpoint.directory import check_plain, open_plain
from zgraph.errors import CheckpointError

CHUNK_BYTES = 4 << 20
"""Of a file that are on the host at once, in each thread."""

NUM_THREADS = 4

Box = tuple[Sequence[int], Sequence[int]]
"""Where a part of a tensor begins, and its shape."""


def checksum(path: Path) -> int:
    """The checksum of a file, of as many bytes as it has when it is opened.

    Raises:
        OSError: it cannot be read.
        CheckpointError: it is no regular file.
    """
    found, buffer = 0, memoryview(bytearray(CHUNK_BYTES))
    with open_plain(path) as file:
        left = os.fstat(file.fileno()).st_size
        while num_bytes := file.readinto(buffer[: min(left, CHUNK_BYTES)]):  # type: ignore[attr-defined]
            found = zlib.crc32(buffer[:num_bytes], found)
            left -= num_bytes
    return found


def check_file(path: Path, num_bytes: int | None, expected: int) -> None:
    """Check a file.

    Args:
        path: of the file.
        num_bytes: how long it is; None where nobody has written that down.
        expected: its checksum.

    Raises:
        CheckpointError: it is missing, no regular file, or not what was written; the message names it.
    """
    try:
        check_plain(path)
        if num_bytes is not None and path.lstat().st_size != num_bytes:
            raise CheckpointError(f"{path} is damaged: it has another size than it was written with")
        found = checksum(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if found != expected:
        raise CheckpointError(
            f"{path} is damaged: its checksum is {found:08x}, and {expected:08x} was written; load another checkpoint"
        )


def check_files(folder: Path, checksums: Mapping[str, int], rank: int = 0, num_ranks: int = 1) -> None:
    """Check a rank's share of the files; the ranks together check all.

    Raises:
        CheckpointError: a file is missing or is not what was written; the message names it.
    """

    with ThreadPoolExecutor(NUM_THREADS) as threads:
        for _ in threads.map(lambda n: check_file(folder / n, None, checksums[n]), sorted(checksums)[rank::num_ranks]):
            pass


def is_tiled(shape: Sequence[int], boxes: Sequence[Box]) -> bool:
    """Whether parts cover a tensor: each number of it once."""
    numel, covered = _numel(shape), 0
    for offsets, sizes in boxes:
        if not len(offsets) == len(sizes) == len(shape):
            return False
        if any(o + s > n for o, s, n in zip(offsets, sizes, shape, strict=True)):
            return False
        covered += _numel(sizes)
    return covered == numel and not _any_overlap([box for box in boxes if _numel(box[1])])


def _any_overlap(boxes: Sequence[Box]) -> bool:
    """Whether two of these share a number. They are swept along the dimension in which most begin elsewhere."""
    if len(boxes) < 2:
        return False
    dims = range(len(boxes[0][0]))
    along = max(dims, key=lambda d: len({offsets[d] for offsets, _ in boxes}), default=None)
    if along is None:
        return True
    ordered = sorted(boxes, key=lambda box: box[0][along])
    for at, (offsets, sizes) in enumerate(ordered):
        for other in range(at + 1, len(ordered)):
            begin, extent = ordered[other]
            if begin[along] >= offsets[along] + sizes[along]:
                break
            if all(a < b + n and b < a + m for a, m, b, n in zip(offsets, sizes, begin, extent, strict=True)):
                return True
    return False


def _numel(sizes: Sequence[int]) -> int:
    numel = 1
    for size in sizes:
        numel *= size
    return numel
