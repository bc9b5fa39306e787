"""Results of a lease: one line of JSON each, on the disk before the next is begun."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.errors import last_line

FILE = "results.jsonl"


@dataclass(frozen=True)
class Result:
    """One result.

    Args:
        part: that found it.
        name: of the check or the figure, unique within the part and rank.
        ok: whether the check passed; None for a figure that nothing is demanded of.
        value: a number, or a word.
        unit: of the value.
        seconds: that it took.
        more: further keys of the line, such as `error`.
    """

    part: str
    name: str
    ok: bool | None = None
    value: Any = None
    unit: str = ""
    seconds: float = 0.0
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """As it is in the file. JSON has no infinities: they are words there."""
        found = {
            "part": self.part,
            "name": self.name,
            "ok": self.ok,
            "value": self.value,
            "unit": self.unit,
            "seconds": round(self.seconds, 3),
            **self.more,
        }
        return json.dumps({key: _finite(value) for key, value in found.items()}, default=str)

    @classmethod
    def parse(cls, line: str) -> Result:
        """The result of a line. Raises ValueError for one that is cut off."""
        found = json.loads(line)
        if not isinstance(found, dict):
            raise ValueError(f"no result: {line}")
        known = {key: found.pop(key, None) for key in ("part", "name", "ok", "value", "unit", "seconds")}
        return cls(**known, more=found)


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write(folder: Path, result: Result) -> None:
    """Append a result to the folder's file, and have it on the disk."""
    with open(folder / FILE, "ab+") as file:
        begin = b"" if _ends_a_line(file) else b"\n"
        file.write(begin + result.line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _ends_a_line(file: Any) -> bool:
    """Whether nobody was killed in the middle of a line."""
    if not file.seek(0, os.SEEK_END):
        return True
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")


def read(folder: Path, begin: int = 0) -> tuple[list[Result], int]:
    """The results that begin at an offset of the file, but those that are cut off; and the offset of its end."""
    path = folder / FILE
    text = path.read_bytes()[begin:] if path.exists() else b""
    found = []
    for line in text.decode(errors="replace").splitlines():
        try:
            found.append(Result.parse(line))
        except ValueError:
            continue
    return found, begin + len(text)


class Emit:
    """Writes the results of a part.

    Args:
        folder: where the file is.
        part: its name.
        limit_s: seconds that the part has from now on.
        common: further keys of each line.
        done: names of results that there are already, of a first run of the part that broke the device.
    """

    def __init__(
        self,
        folder: Path,
        part: str,
        limit_s: float = math.inf,
        common: dict[str, Any] | None = None,
        done: frozenset[str] = frozenset(),
    ) -> None:
        self.folder, self.part, self.common, self.done = folder, part, common or {}, done
        self.until = time.monotonic() + limit_s
        self._began = time.monotonic()
        self._lock = threading.Lock()

    @property
    def left_s(self) -> float:
        """Seconds that are left."""
        return self.until - time.monotonic()

    def __call__(
        self,
        name: str,
        value: Any = None,
        unit: str = "",
        *,
        ok: bool | None = None,
        seconds: float | None = None,
        **more: Any,
    ) -> None:
        """Write a result. By default it took as long as there was none."""
        with self._lock:
            now = time.monotonic()
            took = now - self._began if seconds is None else seconds
            self._began = now
            write(self.folder, Result(self.part, name, ok, value, unit, took, {**self.common, **more}))

    @contextmanager
    def trying(self, name: str) -> Iterator[None]:
        """Context whose exception is the result of a check that failed. What comes after goes on, unless the device is
        broken: then nothing in this process can."""
        try:
            yield
        except Exception as error:
            self(name, ok=False, error=last_line(error))
            if "CUDA error" in str(error):
                raise
