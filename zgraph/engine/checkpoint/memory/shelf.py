"""Where a host keeps copies of shards: in shared memory, which outlives the processes of a job.

Below a private folder of the user there is one for each job, with one for each rank, with one for each copy: the files
that a checkpoint has of that rank, with the index. A copy is written beside and renamed when it is whole; two of them
are kept, so that one that is damaged is not the only one.
"""

from __future__ import annotations

import fcntl
import gc
import os
import re
import secrets
import shutil
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from zgraph.bridge.private_files import private_folder
from zgraph.engine.checkpoint.index import AnyIndex, Index
from zgraph.engine.checkpoint.storage import INDEX
from zgraph.errors import CacheError, CheckpointError

_MARK = re.compile(r"([0-9]{1,9})\.([0-9]{1,15})\.([0-9a-f]{16})")
_RANK = re.compile(r"rank_([0-9]{1,7})")
_REMEDY = "give another checkpoint.memory.folder"
_LOCK = ".lock"
_PATIENCE_S = 10.0
"""How long one that was killed may take until it is gone."""
_HELD: dict[Path, tuple[int, weakref.ref[object]]] = {}
"""Locks of this process, the files that they are held by, and for whom: a lock ends when any of its files is closed."""


class Mark(NamedTuple):
    """Name of the copies that all ranks made in one step. Later ones are greater.

    Args:
        attempt: how often the job had been started.
        step: after which they were made.
        token: drawn anew in each attempt, so that copies of two are never mixed.
    """

    attempt: int
    step: int
    token: str

    def __str__(self) -> str:
        return f"{self.attempt}.{self.step}.{self.token}"

    @classmethod
    def parse(cls, text: str) -> Mark | None:
        """The mark that was printed; None if it is none.

        >>> str(Mark.parse("2.40.0123456789abcdef"))
        '2.40.0123456789abcdef'
        """
        found = _MARK.fullmatch(text)
        return cls(int(found[1]), int(found[2]), found[3]) if found is not None else None


@dataclass(frozen=True)
class Shelf:
    """Copies of a job on this host.

    Args:
        folder: of the job; private to the user.
    """

    folder: Path

    @classmethod
    def of(cls, root: Path, job: str) -> Shelf:
        """The shelf of a job, made if it is missing.

        Raises:
            CheckpointError: it cannot be a private folder.
        """
        try:
            return cls(private_folder(root / f"zgraph-{os.geteuid()}", job, _REMEDY))
        except CacheError as error:
            raise CheckpointError(str(error)) from None

    def hold(self, rank: int, owner: object) -> None:
        """Keep others from making copies of the same rank of a job of this name: other processes while this one lives,
        and others in this one while the owner does.

        Args:
            rank: whose copies are made.
            owner: who makes them.

        Raises:
            CheckpointError: another does.
        """
        path = self.folder / f"rank_{rank}" / _LOCK
        if path in _HELD:
            held, before = _HELD[path]
            if before() not in (None, owner):
                gc.collect()  # an engine is in a circle with its parts: one that nobody has any more may still be there
            if before() not in (None, owner):
                raise self._taken(rank, "another engine of this process")
            if _is_at(held, path):
                _HELD[path] = held, weakref.ref(owner)
                return
            os.close(_HELD.pop(path)[0])
        _HELD[path] = self._locked(path, rank), weakref.ref(owner)

    def _locked(self, path: Path, rank: int) -> int:
        """A descriptor of the file of a rank's lock, which this process holds from now on. Raises CheckpointError."""
        until = time.monotonic() + _PATIENCE_S
        while True:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            why = "its file is removed again and again"
            try:
                fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(held, path):  # and not removed meanwhile, by one that came to its end
                    return held
            except OSError as error:
                why = str(error.strerror)
            os.close(held)
            if time.monotonic() > until:
                raise self._taken(rank, "another process", why)
            time.sleep(0.1)

    def _taken(self, rank: int, by: str, why: str = "") -> CheckpointError:
        why = f" ({why})" if why else ""
        return CheckpointError(
            f"{by} makes copies of rank {rank} in {self.folder}{why}: a job of the same name runs here. Give "
            "each its own checkpoint.memory.job"
        )

    def meeting(self, rank: int) -> Path:
        """A new file that tells others, who see it, that they have the same folder. Raises OSError."""
        for left in self.folder.glob(f".here_{rank}.*"):
            left.unlink(missing_ok=True)
        path = self.folder / f".here_{rank}.{secrets.token_hex(8)}"
        path.touch(mode=0o600)
        return path

    def place(self, rank: int, mark: Mark) -> Path:
        """The folder of a copy of a rank's shards."""
        return self.folder / f"rank_{rank}" / str(mark)

    def draft(self, rank: int, mark: Mark) -> Path:
        """The folder in which a copy is written."""
        return self.folder / f"rank_{rank}" / f".{mark}.{secrets.token_hex(4)}"

    def begin(self, draft: Path) -> None:
        """Make a folder to write a copy in. Removes what was begun before. Raises OSError."""
        home = draft.parent
        home.mkdir(mode=0o700, exist_ok=True)
        self.drop_drafts(int(home.name.removeprefix("rank_")))
        draft.mkdir(mode=0o700)

    def drop_drafts(self, rank: int) -> None:
        """Remove what was begun of a rank's copies, and is none."""
        for left in (self.folder / f"rank_{rank}").glob(".*"):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)

    def complete(self, written: Path, rank: int, mark: Mark) -> None:
        """Make a folder whose files are all there a copy. Raises OSError."""
        for file in written.iterdir():
            file.chmod(0o600)
        home = self.place(rank, mark)
        if home.exists():
            shutil.rmtree(home)
        written.rename(home)

    def copies(self) -> Iterator[tuple[Mark, int]]:
        """The copies that are here, whole by their names: which of which rank."""
        for path in self.folder.glob("rank_*/*"):
            of, mark = _RANK.fullmatch(path.parent.name), Mark.parse(path.name)
            if of is not None and mark is not None and path.is_dir() and not path.is_symlink():
                yield mark, int(of[1])

    def ranks(self) -> set[int]:
        """The ranks of which something is here."""
        return {int(of[1]) for path in self.folder.glob("rank_*") if (of := _RANK.fullmatch(path.name))}

    def age_s(self, mark: Mark) -> float:
        """Seconds since the last of the copies with a mark was made, of those that are here; 0 if none is."""
        made = [self.place(rank, mark).stat().st_mtime for found, rank in self.copies() if found == mark]
        return max(time.time() - max(made), 0.0) if made else 0.0

    def check_in(self, folder: Path, rank: int) -> Index:
        """The index of a copy all of whose bytes are what was written.

        Args:
            folder: of the copy.
            rank: whose shards it has.

        Raises:
            CheckpointError: they are not.
        """
        index = AnyIndex.read(folder / INDEX)
        if not isinstance(index, Index) or index.problem() or rank >= index.num_ranks:
            raise CheckpointError(f"{folder / INDEX} is damaged, or has no rank {rank}")
        index.check_rank(folder, rank)
        return index

    def remove_but(self, *marks: Mark | None) -> None:
        """Remove all copies but those of some marks."""
        for found, rank in list(self.copies()):
            if found not in marks:
                shutil.rmtree(self.place(rank, found), ignore_errors=True)

    def remove_of(self, mark: Mark, ranks: Sequence[int]) -> None:
        """Remove the copies of some ranks with a mark."""
        for rank in ranks:
            shutil.rmtree(self.place(rank, mark), ignore_errors=True)

    def remove(self, ranks: Sequence[int]) -> None:
        """Remove everything of some ranks, and the job's folder if it is empty then."""
        for rank in ranks:
            home = self.folder / f"rank_{rank}"
            shutil.rmtree(home, ignore_errors=True)
            if (held := _HELD.pop(home / _LOCK, None)) is not None:
                os.close(held[0])
        with suppress(OSError):  # others have copies there
            self.folder.rmdir()


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one at a path."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    return False
