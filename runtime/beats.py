"""Words that a rank says with each beat of its heart: that it lives, where it is, and what it waits for."""

from __future__ import annotations

import json
import time
import zlib
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple


class Place(NamedTuple):
    """Where a rank is: in which call of a model, and what it waits for there, or has waited for last."""

    call: int
    what: str
    waits: bool
    since: float

    def __str__(self) -> str:
        if self.waits:
            return f"waits for {self.what} in call {self.call}"
        after = f", after {self.what}" if self.what else ""
        return f"has not answered for {time.monotonic() - self.since:.0f} s, last seen in call {self.call}{after}"


UNREADABLE = "its heartbeat is unreadable: is it of another version of zgraph?"
"""Place of a rank whose heartbeat is none."""


@dataclass(frozen=True)
class Beat:
    """One heartbeat.

    Args:
        count: grows from one to the next.
        place: where the rank is, as `Place` prints it.
        waits: whether it waits there for other ranks.
        outside: the function of torch.distributed that its main thread has waited in for long; mostly nothing.
        wait: of a rank that has waited for a while, what `Wait.word` says; else empty.
        pace: how long its calls take, as `Pace.word` says.
    """

    count: int
    place: str = ""
    waits: bool = False
    outside: str = ""
    wait: dict[str, Any] = field(default_factory=dict)
    pace: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def parse(word: bytes) -> Beat | None:
        """The heartbeat that was printed; None of a rank that has never been seen.

        What another version of zgraph says beside is left out.

        Raises:
            ValueError: it is no heartbeat.
        """
        if not word:
            return None
        try:
            found = json.loads(word)
        except RecursionError:
            raise ValueError("a heartbeat is nested too deep") from None
        if not isinstance(found, dict) or "count" not in found:
            raise ValueError("a heartbeat is a mapping with a count")
        known = {entry.name: found[entry.name] for entry in fields(Beat) if entry.name in found}
        if wrong := [name for name, value in known.items() if type(value) is not _KINDS[name]]:
            raise ValueError(f"a heartbeat with another {wrong[0]} than {_KINDS[wrong[0]].__name__}")
        if known.get("wait") and not _is_wait(known["wait"]):
            raise ValueError("a heartbeat with another wait than a rank tells of")
        return Beat(**known)

    @staticmethod
    def read(word: bytes) -> Beat | None:
        """The heartbeat that was printed; None of a rank that has never been seen.

        Of one that is none, it says so: whoever listens hears that something new came, and nothing else.
        """
        try:
            return Beat.parse(word)
        except ValueError:
            return Beat(zlib.crc32(word), UNREADABLE)


_KINDS: dict[str, type] = {"count": int, "place": str, "waits": bool, "outside": str, "wait": dict, "pace": dict}


_WAIT_KINDS: dict[str, type] = {
    "serial": int,
    "looks": int,
    "place": str,
    "number": int,
    "comparison": str,
    "scope": str,
    "journal": str,
    "last": list,
    "begun": dict,
}


def _is_wait(word: dict[str, Any]) -> bool:
    """Whether this is what a rank says of its wait (`Wait.word`)."""
    if any(type(word.get(name)) is not kind for name, kind in _WAIT_KINDS.items()):
        return False
    numbers = [*word["last"], *word["begun"].values()]
    return len(word["last"]) in (0, 2) and all(type(number) is int for number in numbers)


def beat_key(rank: int) -> str:
    """Where a rank's heartbeat is in the store."""
    return f"zgraph/beat/{rank}"
