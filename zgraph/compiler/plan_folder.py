"""A folder of kept plans: one file for each key, of this user alone, the oldest removed where there are too many."""

from __future__ import annotations

import os
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from zgraph.bridge.private_files import private_folder, read_sealed, write_sealed
from zgraph.environment import cache_folder, environment
from zgraph.errors import CacheError, KeptPlanWarning, in_one_line

NAME = "plans"

MAX_BYTES = 64 << 20
"""Of a file; a plan of 80 layers has some 500 KB."""

MAX_FOLDER_BYTES = 512 << 20
"""Of all files of a folder; those that were not used for longest are removed."""


@dataclass(frozen=True)
class PlanFolder:
    """Plans that are kept from one run to the next.

    Args:
        folder: in which they lie; it belongs to this user, and nobody else may look in.
        suffix: of their files.
    """

    folder: Path
    suffix: str = ".plan"

    def path(self, key: str) -> Path:
        """The file of a key."""
        return self.folder / f"{key}{self.suffix}"

    def find(self, key: str) -> bytes | None:
        """Bytes that are kept for a key; None where nothing is. A file that is not whole is removed, with a warning."""
        path = self.path(key)
        held = read_sealed(path, MAX_BYTES)
        if held is None:
            if path.is_symlink() or path.exists():
                self.refuse(key, "it is not whole, or not this user's own")
            return None
        with suppress(OSError):
            os.utime(path)
        return held

    def refuse(self, key: str, why: str) -> None:
        """Remove what is kept for a key, and warn of why."""
        path = self.path(key)
        with suppress(OSError):
            path.unlink()
        warnings.warn(f"the kept file {path} is removed: {why}", KeptPlanWarning, stacklevel=2)

    def keep(self, key: str, held: bytes) -> None:
        """Keep a plan, and make room for it. Where it cannot be written, a KeptPlanWarning says so."""
        if self.path(key).exists():
            return  # another rank of this host was faster
        try:
            write_sealed(self.path(key), held, MAX_BYTES)
        except CacheError as error:
            warnings.warn(f"a plan or trace is not kept: {in_one_line(error)}", KeptPlanWarning, stacklevel=2)
        self._make_room()

    def _make_room(self) -> None:
        found = []
        for path in self.folder.glob("[!.]*.*"):
            with suppress(OSError):
                status = path.lstat()
                found.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= MAX_FOLDER_BYTES:
                return
            with suppress(OSError):
                path.unlink()
            total -= size


def plan_folder() -> PlanFolder | None:
    """The folder that ZGRAPH_PLANS asks for; None where it asks for none.

    Where that cannot be a folder of this user alone, a KeptPlanWarning says so, and none is kept.
    """
    wanted = environment().plans
    if wanted is False:
        return None
    root = cache_folder() if wanted is True else wanted
    try:
        return PlanFolder(private_folder(root, NAME, "set ZGRAPH_PLANS to a folder of your own, or to 0"))
    except CacheError as error:
        warnings.warn(f"no plan is kept: {in_one_line(error)}", KeptPlanWarning, stacklevel=2)
        return None
