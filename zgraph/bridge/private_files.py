"""Files that nobody else may have written: private folders of a cache, and drafts that are renamed into place.

A file in a cache is only a file: whoever reads it checks what it holds.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from zgraph.errors import CacheError

_SEAL_BYTES = 32

_REMEDY = "set XDG_CACHE_HOME to your own folder"


def private_folder(root: Path, name: str, remedy: str = _REMEDY) -> Path:
    """The folder `root/name`, made if it is missing; the two belong to this user, and nobody else may look in.

    Args:
        root, name: the two folders.
        remedy: words at the end of errors.

    Raises:
        CacheError: one is a link, is another user's, may be written by everyone, or cannot be made.
    """
    for folder in (root, root / name):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            found = folder.lstat()
            if stat.S_ISLNK(found.st_mode):
                raise CacheError(f"{folder} is a link, which may lead anywhere: remove it, or {remedy}")
            if found.st_uid != os.geteuid():
                raise CacheError(f"{folder} belongs to another user (number {found.st_uid}): {remedy}")
            if found.st_mode & stat.S_IWOTH:
                raise CacheError(f"{folder} may be written by everyone: remove it (it is a cache), or {remedy}")
            if stat.S_IMODE(found.st_mode) != 0o700:
                folder.chmod(0o700)
        except OSError as error:
            raise CacheError(f"{folder} cannot be a folder of the cache: {error}; {remedy}") from None
    return root / name


def is_private(folder: Path) -> bool:
    """Whether a folder is this user's, so that nobody else can have written what is in it. One that is missing is."""
    try:
        found = folder.lstat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022


def read_private(path: Path, max_bytes: int) -> bytes | None:
    """Content of a file; None if it is missing, unreadable, longer, a link, no plain file, or another user's."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as stream:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_size > max_bytes:
            return None
        try:
            held = stream.read(max_bytes + 1)
        except OSError:
            return None
    return held if len(held) <= max_bytes else None


def write_private(path: Path, held: bytes) -> None:
    """Write a file of a private folder: as a whole or not at all.

    Raises:
        CacheError: it cannot be written.
    """
    try:
        with drafted(path, 0o600) as stream:
            stream.write(held)
    except OSError as error:
        raise CacheError(f"{path} cannot be written: {error}; make room, or {_REMEDY}") from None


def read_sealed(path: Path, max_bytes: int) -> bytes | None:
    """The bytes that `write_sealed` has written; None as of `read_private`, and of a file that is not whole."""
    held = read_private(path, max_bytes)
    if held is None or hashlib.sha256(held[_SEAL_BYTES:]).digest() != held[:_SEAL_BYTES]:
        return None
    return held[_SEAL_BYTES:]


def write_sealed(path: Path, held: bytes, max_bytes: int) -> None:
    """Write a file of a private folder behind its SHA-256; nothing where that would be longer than `max_bytes`.

    Raises:
        CacheError: it cannot be written.
    """
    if len(held) + _SEAL_BYTES <= max_bytes:
        write_private(path, hashlib.sha256(held).digest() + held)


@contextmanager
def drafted(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A draft to write in, beside a file, that takes its place at the end, and is removed where something fails.

    Nobody can guess the draft's name, and it is made only where nothing of that name is, so no link is followed.

    Args:
        path: of the file.
        mode: its permissions, less those that the process takes from all its files.
    """
    draft = path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}.draft")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(draft, flags, mode)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
