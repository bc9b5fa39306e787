"""A folder of kept traces, which are believed only behind the mark of a key that is this user's own.

A trace says what a model computes, and nothing that is captured here tells that it is right. So a file counts only with
a mark (HMAC-SHA-256) that takes the user's key, a file of the cache with mode 0600: a folder of somebody else's, which
was copied here, is not believed.
"""

from __future__ import annotations

import hmac
import secrets
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

from zgraph.bridge.private_files import private_folder, read_private, write_private
from zgraph.compiler.plan_folder import PlanFolder
from zgraph.environment import cache_folder
from zgraph.errors import CacheError, KeptPlanWarning, in_one_line

_KEY_BYTES, _MARK_BYTES = 32, 32


@dataclass
class KeptTraces:
    """Traces of one model, in the folder of its plans.

    Args:
        folder: where they lie; None keeps none.
        salted: gives the text of what the compiler of captured graphs depends on; None where no trace is kept.

    `counts` has how many were made and how many were reused.
    """

    folder: PlanFolder | None
    salted: Callable[[], str | None]
    counts: Counter[str] = field(default_factory=Counter)

    def salt(self) -> str | None:
        """Text of what the compiler depends on; None where no trace is kept."""
        return self.salted() if self.folder is not None and user_key() else None

    def find(self, key: str) -> bytes | None:
        """Bytes that are kept for a key, if it has this user's mark."""
        assert self.folder is not None
        if (held := self.folder.find(key)) is None:
            return None
        if not hmac.compare_digest(held[:_MARK_BYTES], _mark(key, held[_MARK_BYTES:])):
            self.refuse(key, "it has not this user's mark")
            return None
        return held[_MARK_BYTES:]

    def keep(self, key: str, held: bytes) -> None:
        """Keep a trace."""
        assert self.folder is not None
        self.folder.keep(key, _mark(key, held) + held)

    def refuse(self, key: str, why: str) -> None:
        """Remove what is kept for a key, and warn of why."""
        assert self.folder is not None
        self.folder.refuse(key, why)

    def count(self, *, found: bool) -> None:
        """Take note of a trace: whether it was found."""
        self.counts["reused" if found else "made"] += 1


@cache
def user_key() -> bytes:
    """The key of this user's marks, made where there is none; empty where it cannot be kept, after a warning."""
    try:
        path = private_folder(cache_folder(), "keys") / "traces"
        if (held := read_private(path, _KEY_BYTES)) is None or len(held) != _KEY_BYTES:
            write_private(path, secrets.token_bytes(_KEY_BYTES))
            held = read_private(path, _KEY_BYTES)  # of whichever process was last to write
    except CacheError as error:
        warnings.warn(f"no trace is kept: {in_one_line(error)}", KeptPlanWarning, stacklevel=2)
        return b""
    return held or b""


def _mark(key: str, held: bytes) -> bytes:
    return hmac.digest(user_key(), key.encode() + held, "sha256")
