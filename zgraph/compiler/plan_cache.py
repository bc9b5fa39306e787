"""A folder of kept plans: one file for each key, of this user alone, the oldest removed where there are too many."""

from __future__ import annotations

import os
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from zgraph.bridge.private_files import own_folder, private_folder, read_private, write_private
from zgraph.environment import cache_folder, environment
from zgraph.errors import CacheError, PlanCacheWarning, RunFileError, UsageError, in_one_line
from zgraph.runfile.kept import MAX_BYTES, Kept, load_kept, name_of

FOLDER = "plans"

MAX_FOLDER_BYTES = 1 << 30
"""Bytes of all kept plans of a folder; those that were not used for longest are removed."""

_REMEDY = "pass plan_cache= (or set ZGRAPH_PLAN_CACHE to) another folder"


@dataclass(frozen=True)
class PlanCache:
    """Plans that are kept from one run to the next.

    Args:
        folder: in which they lie; it belongs to this user, and nobody else may look in.
    """

    folder: Path

    def path(self, key: str) -> Path:
        """The file of a key."""
        return self.folder / name_of(key)

    def find(self, key: str) -> Kept | None:
        """The plan of a key; None where there is none, or, after a PlanCacheWarning, one that is damaged."""
        path = self.path(key)
        if (held := read_private(path, MAX_BYTES)) is None:
            return None
        try:
            found = load_kept(held, key)
        except RunFileError as error:
            self.refuse(key, error)
            return None
        with suppress(OSError):
            os.utime(path)
        return found

    def refuse(self, key: str, error: Exception) -> None:
        """Warn of a file that cannot be used, and remove it."""
        path = self.path(key)
        with suppress(OSError):
            path.unlink()
        warnings.warn(
            f"the kept plan {path} is not used, and removed: {in_one_line(error)}. The model is captured anew",
            PlanCacheWarning,
            stacklevel=2,
        )

    def keep(self, key: str, held: bytes) -> None:
        """Keep a plan, and make room for it. Where it cannot be written, a PlanCacheWarning says so."""
        try:
            if len(held) <= MAX_BYTES and not self._has(key, held):
                write_private(self.path(key), held)
                self._make_room()
        except CacheError as error:
            warnings.warn(f"a plan is not kept: {in_one_line(error)}", PlanCacheWarning, stacklevel=2)

    def _has(self, key: str, held: bytes) -> bool:
        """Whether another rank has written the same."""
        return read_private(self.path(key), len(held)) == held

    def _make_room(self) -> None:
        found = []
        for path in self.folder.glob("*.zg"):
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


def plan_cache(given: str | Path | bool | None) -> PlanCache | None:
    """The cache that an option asks for, or else ZGRAPH_PLAN_CACHE; None where neither asks for one.

    Args:
        given: a folder, whose subfolder `plans` it is; True for the cache of this user; False for none.

    Raises:
        UsageError: it is none of these.
        CacheError: the folder cannot be one of this user alone.
    """
    wanted = environment().plan_cache if given is None else given
    if wanted is None or wanted is False:
        return None
    if wanted is True:
        return PlanCache(private_folder(cache_folder(), FOLDER))
    if not isinstance(wanted, str | Path) or not str(wanted):
        raise UsageError(f"plan_cache must be a folder, True, False or None, not {wanted!r}")
    return PlanCache(own_folder(Path(wanted).expanduser() / FOLDER, _REMEDY))
