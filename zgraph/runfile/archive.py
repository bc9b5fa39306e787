"""The texts of a zip archive from anywhere, unpacked piece by piece and given up where they are more than a run has.

A zip file can promise anything: a thousand times its size, members that share their bytes, an index longer than what
it lists. So nothing of it is believed; each piece is counted as it is unpacked.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from zgraph.errors import RunFileError

_PIECE = 1 << 16
_END = struct.Struct("<4s4H2LH")


@dataclass(frozen=True)
class Limits:
    """Limits of an archive. 80 layers after each of 14 passes have 400,000 lines in 50 MB.

    Args:
        max_bytes: of all members, unpacked.
        max_ratio: of that to the size of the file, which is some 15 for a run of 80 layers.
        floor_bytes: are never too many for the ratio.
        max_members: how many texts.
        max_index_bytes: of the list of members, which is read first.
        max_lines: of one text.
        max_line_bytes: of one line.
    """

    max_bytes: int = 512 << 20
    max_ratio: int = 200
    floor_bytes: int = 1 << 20
    max_members: int = 1000
    max_index_bytes: int = 1 << 18
    max_lines: int = 400_000
    max_line_bytes: int = 1 << 20


LIMITS = Limits()


class Archive:
    """An open archive: its members as bytes, each read once.

    Args:
        archive: the zip file.
        name: what the file is called in errors.
        num_bytes: its size.
        limits: what it may hold.
    """

    def __init__(self, archive: zipfile.ZipFile, name: str, num_bytes: int, limits: Limits) -> None:
        self.archive, self.name, self.limits = archive, name, limits
        self.left = min(limits.max_bytes, max(limits.floor_bytes, limits.max_ratio * num_bytes))
        self.members: Mapping[str, zipfile.ZipInfo] = _members(archive, name, limits)

    def read(self, member: str, *, is_graph: bool = False) -> bytes:
        """The bytes of a member.

        Args:
            member: its name.
            is_graph: it has lines, whose number and lengths are limited.

        Raises:
            RunFileError: there is none of that name, or it has too many bytes, lines, or bytes in a line.
        """
        if member not in self.members:
            raise RunFileError(f"{self.name} is damaged: it has no {member[:60]!r}; write it again with zgraph trace")
        pieces: list[bytes] = []
        num_lines = length = 0
        with self.archive.open(self.members[member]) as stream:
            while piece := stream.read(_PIECE):
                self.left -= len(piece)
                num_lines += piece.count(b"\n")
                longest, length = _longest(piece, length)
                if self.left < 0:
                    raise self._too_much(f"unpacks to {self.limits.max_ratio} times its size or more")
                if is_graph and num_lines > self.limits.max_lines:
                    raise self._too_much(f"has more than {self.limits.max_lines:,} lines in {member[:60]!r}")
                if is_graph and longest > self.limits.max_line_bytes:
                    raise self._too_much(f"has a line of more than {self.limits.max_line_bytes:,} bytes")
                pieces.append(piece)
        return b"".join(pieces)

    def _too_much(self, what: str) -> RunFileError:
        return RunFileError(f"{self.name} {what}, more than any run: it is not read; write it again with zgraph trace")


def _longest(piece: bytes, before: int) -> tuple[int, int]:
    """The length of the longest line that a piece ends or holds part of, and of the one that it leaves open.

    A line within a piece is shorter than a piece, so only the first and the last one can be long.
    """
    first, last = piece.find(b"\n"), piece.rfind(b"\n")
    if first < 0:
        return before + len(piece), before + len(piece)
    return before + first, len(piece) - last - 1


@contextmanager
def opened(source: Path | BinaryIO, name: str, limits: Limits = LIMITS) -> Iterator[Archive]:
    """An archive to read from.

    Raises:
        RunFileError: it cannot be read, is damaged, or holds more than the limits allow.
    """
    try:
        with _stream(source) as stream:
            num_bytes = _checked_size(stream, name, limits)
            with zipfile.ZipFile(stream) as archive:
                yield Archive(archive, name, num_bytes, limits)
    except RunFileError:
        raise
    except OSError as error:
        raise RunFileError(f"cannot read {name}: {error.strerror or error}") from None
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, LookupError, ValueError) as error:
        raise RunFileError(f"{name} is no run file, or is damaged: {error}; write it again with zgraph trace") from None


@contextmanager
def _stream(source: Path | BinaryIO) -> Iterator[BinaryIO]:
    if isinstance(source, Path):
        with source.open("rb") as stream:
            yield stream
    else:
        yield source


def _checked_size(stream: BinaryIO, name: str, limits: Limits) -> int:
    """The bytes of a zip file whose index is not too long to be read."""
    num_bytes = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, num_bytes - (1 << 16) - _END.size))
    tail = stream.read()
    stream.seek(0)
    at = len(tail) - _END.size
    if at < 0 or not tail.startswith(b"PK\5\6", at):
        at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < _END.size:
        raise RunFileError(f"{name} is no run file, or is damaged: no zip file; write it again with zgraph trace")
    _, _, _, _, num_members, index_bytes, _, _ = _END.unpack_from(tail, at)
    if (
        index_bytes > limits.max_index_bytes
        or num_members > limits.max_members
        or b"PK\6\7" in tail[max(0, at - 20) : at]
    ):
        raise RunFileError(
            f"{name} has more than {limits.max_members:,} members, more than any run: it is not read; write it again "
            "with zgraph trace"
        )
    return num_bytes


def _members(archive: zipfile.ZipFile, name: str, limits: Limits) -> dict[str, zipfile.ZipInfo]:
    infos = archive.infolist()
    if len(infos) > limits.max_members:
        raise RunFileError(f"{name} has {len(infos):,} members, more than any run: it is not read")
    found = {info.filename: info for info in infos}
    if len(found) != len(infos):
        twice = next(info.filename for info in infos if found[info.filename] is not info)
        raise RunFileError(f"{name} is damaged: it has {twice[:60]!r} twice; write it again with zgraph trace")
    return found
