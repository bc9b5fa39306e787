"""Where checkpoints lie: a folder for each tag, which is there as a whole or not at all, and `latest`, the last tag.

A checkpoint is written into a folder beside, `.TAG.writing-...`, and renamed when all of it is on disk. One that is
saved again waits as `.TAG.replaced` while the new one takes its place. What a killed write has left is nobody's
checkpoint; the next one removes it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from zgraph.bridge.private_files import drafted
from zgraph.errors import CheckpointError

LATEST = "latest"
MAX_TEXT_BYTES = 1 << 28
"""Of a file of JSON in a checkpoint. A larger one is neither written nor read."""


@dataclass(frozen=True)
class Folders:
    """The folders of one run's checkpoints. One rank makes, renames and removes them.

    Args:
        root: the folder in which they all lie.
    """

    root: Path

    def begin(self, tag: str) -> Path:
        """A new folder to write in. Removes what killed writes have left."""
        self.root.mkdir(parents=True, exist_ok=True)
        for left in self.root.glob(".*.writing-*"):
            shutil.rmtree(left)
        for draft in self.root.glob(f".{LATEST}.*.draft"):
            draft.unlink()
        for old in self.root.glob(".*.replaced"):
            home = self.root / old.name[1:].removesuffix(".replaced")
            if home.exists():
                shutil.rmtree(old)
            else:
                old.rename(home)
        path = self.root / f".{tag}.writing-{secrets.token_hex(4)}"
        path.mkdir()
        return path

    def commit(self, written: Path, tag: str, *, is_latest: bool) -> None:
        """Make a folder whose files are all on disk the checkpoint of this tag."""
        home, old = self.root / tag, self._replaced(tag)
        sync(written)
        if home.exists():
            home.rename(old)
        written.rename(home)
        sync(self.root)
        if is_latest:
            with drafted(self.root / LATEST) as stream:
                stream.write(tag.encode())
                stream.flush()
                os.fsync(stream.fileno())
            sync(self.root)
        shutil.rmtree(old, ignore_errors=True)

    def find(self, tag: str | None) -> Path | None:
        """The folder of this tag, or of the latest; None if there is none.

        Raises:
            CheckpointError: `latest` names no tag, or cannot be read.
        """
        if tag is None:
            latest = self.root / LATEST
            if not latest.is_file():
                return None
            tag = checked_tag(read_text(latest).strip())
        places = (self.root / tag, self._replaced(tag))
        return next((place for place in places if place.is_dir()), None)

    def tags(self) -> list[str]:
        """Those that are there."""
        found = self.root.iterdir() if self.root.is_dir() else ()
        return sorted(path.name for path in found if path.is_dir() and not path.name.startswith("."))

    def _replaced(self, tag: str) -> Path:
        return self.root / f".{tag}.replaced"


def checked_tag(tag: object) -> str:
    """The tag as a text.

    Raises:
        CheckpointError: it cannot be the name of a folder.
    """
    text = str(tag)
    if not text or text != Path(text).name or text.startswith(".") or text == LATEST or "\0" in text or len(text) > 200:
        raise CheckpointError(f"a tag is the name of a folder, without a dot before it, and not {text[:80]!r}")
    return text


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a file, and wait until it is on disk.

    Raises:
        CheckpointError: it would be larger than what is read.
    """
    told = text.encode()
    if len(told) > MAX_TEXT_BYTES:
        raise CheckpointError(f"{path} is not saved: {_too_large(len(told))}; keep less in client_state")
    path.write_bytes(told)
    sync(path)


def read_text(path: Path) -> str:
    """The text in a file.

    Raises:
        CheckpointError: it cannot be read, is no regular file, is too large, or is no text.
    """
    try:
        with open_plain(path) as file:
            if (size := os.fstat(file.fileno()).st_size) > MAX_TEXT_BYTES:
                raise CheckpointError(f"{path} is not read: {_too_large(size)}; load another checkpoint")
            return file.read(size).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def check_plain(path: Path) -> None:
    """Check that there is a regular file, and no link, pipe or device.

    Raises:
        OSError: there is none.
        CheckpointError: it is something else.
    """
    if not stat.S_ISREG(path.lstat().st_mode):
        raise CheckpointError(f"{path} is no regular file: a checkpoint has no links, pipes or devices; copy it whole")


def open_plain(path: Path) -> BinaryIO:
    """A regular file, opened to read its bytes without a buffer. Raises as `check_plain` does."""
    check_plain(path)
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0)


def _too_large(num_bytes: int) -> str:
    return f"it has {num_bytes} bytes, and a file of JSON in a checkpoint has at most {MAX_TEXT_BYTES}"
