"""Ranks that wait in torch.distributed itself, in a barrier say, while others wait for them in a call of the model.

A rank whose loader was shorter has left its loop, and waits where the others never come. It cannot tell by itself: its
heartbeat looks at where the main thread stands, and says so in the store.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from zgraph.bridge.private_runtime import Store

AFTER_SECONDS = 3.0
LASTING_BEATS = 6
"""How often a rank must have told of the same wait since another began to look: what it told before may be over."""
_TORCH = "/torch/distributed/"
_WAITS = "/torch/distributed/distributed_c10d.py"
"""Where Python stands while a collective waits. Elsewhere in torch.distributed, an op of a DTensor may compute."""


class Lookout:
    """Looks where the main thread of this process waits.

    Args:
        store: where it is told.
        rank: this one.
    """

    def __init__(self, store: Store, rank: int) -> None:
        self.store, self.rank = store, rank
        self._seen: tuple[str, int] = ("", 0)
        self._since, self._tells = 0.0, False

    def look(self, beat: int) -> None:
        """Tell of a wait that has become long, at each beat, and that it is over."""
        seen = waits_at(sys._current_frames().get(threading.main_thread().ident or 0))
        if seen != self._seen:
            self._seen, self._since = seen, time.monotonic()
        is_long = bool(seen[0]) and time.monotonic() - self._since >= AFTER_SECONDS
        if is_long or self._tells:
            self._tells = is_long
            self.store.set(_key(self.rank), f"{beat} {seen[0]}" if is_long else "")


def waits_at(frame: FrameType | None) -> tuple[str, int]:
    """The function of torch.distributed that a thread waits in, with the line that called it, and an identity of the
    call; nothing if it waits in none, or if zgraph called it, whose ranks all do.
    """
    name, call = "", 0
    if frame is None or not frame.f_code.co_filename.endswith(_WAITS):
        return "", 0
    while frame is not None:
        file = frame.f_code.co_filename
        if _TORCH in file and frame.f_code.co_name != "wrapper":
            name, call = frame.f_code.co_name, id(frame)
        elif name and "/torch/" not in file:
            if str(frame.f_globals.get("__name__", "")).startswith("zgraph."):
                return "", 0
            return f"torch.distributed's {name} ({Path(file).name}:{frame.f_lineno})", call
        frame = frame.f_back
    return "", 0


Seen = dict[int, tuple[int, str]]
"""For each rank the beat at which it was first found in a wait, and which."""


def elsewhere(store: Store, rank: int, ranks: Sequence[int], place: str, waiting: Sequence[int], seen: Seen) -> str:
    """Says which rank waits outside of the model, if no rank can go on; else empty.

    Args:
        store: where ranks tell.
        rank: this one, which waits in a call of the model.
        ranks: all that take part.
        place: what this one waits for.
        waiting: the ranks that wait in calls of the model, this one among them.
        seen: what earlier looks of the same wait have found; it is kept up here.
    """
    others = [r for r in ranks if r not in waiting]
    words = {r: store.get(_key(r)).decode() if store.check([_key(r)]) else "" for r in others}
    for other in ranks:
        beat, _, word = words.get(other, "").partition(" ")
        if not word:
            seen.pop(other, None)
        elif seen.get(other, (0, ""))[1] != word:
            seen[other] = int(beat), word
    lasts = [r in seen and int(words[r].partition(" ")[0]) - seen[r][0] >= LASTING_BEATS for r in others]
    if not others or not all(lasts):
        return ""
    places = "; ".join(f"rank {r} made fewer calls of the model and waits in {seen[r][1]}" for r in others)
    return (
        f"{places}, while rank {rank} waits for {place}. All ranks must call the model equally often: give loaders of "
        "the same length (drop_last=True, DistributedSampler), or train within `with zgraph.join(model) as joined: for "
        "batch in joined(loader):`"
    )


def _key(rank: int) -> str:
    return f"zgraph/elsewhere/{rank}"
