"""Ranks that wait in torch.distributed itself, in a barrier say, while others wait for them in a call of the model.

A rank whose loader was shorter has left its loop, and waits where the others never come. It cannot tell by itself: its
heartbeat looks at where the main thread stands, and says so.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from zgraph.runtime.beats import Beat

AFTER_SECONDS = 3.0
LASTING_BEATS = 2
"""How often a rank must have told of the same wait since another began to look: what it told before may be over."""
_TORCH = "/torch/distributed/"
_WAITS = "/torch/distributed/distributed_c10d.py"
"""Where Python stands while a collective waits. Elsewhere in torch.distributed, an op of a DTensor may compute."""


class Lookout:
    """Looks where the main thread of this process waits."""

    def __init__(self) -> None:
        self._seen: tuple[str, int] = ("", 0)
        self._since = 0.0

    def look(self) -> str:
        """The function of torch.distributed that the main thread has waited in for long; empty if it does not."""
        seen = waits_at(sys._current_frames().get(threading.main_thread().ident or 0))
        if seen != self._seen:
            self._seen, self._since = seen, time.monotonic()
        return seen[0] if time.monotonic() - self._since >= AFTER_SECONDS else ""


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
"""For each rank the heartbeat with which it was first found in a wait, and which."""


def elsewhere(rank: int, place: str, beats: Mapping[int, Beat | None], seen: Seen) -> str:
    """Says which rank waits outside of the model, if no rank can go on; else empty.

    Args:
        rank: this one, which waits in a call of the model.
        place: what it waits for.
        beats: the last heartbeat of each rank that takes part.
        seen: what earlier looks of the same wait have found; it is kept up here.
    """
    others = {r: beat for r, beat in sorted(beats.items()) if r != rank and not (beat is not None and beat.waits)}
    for other in beats:
        beat = others.get(other)
        if beat is None or not beat.outside:
            seen.pop(other, None)
        elif seen.get(other, (0, ""))[1] != beat.outside:
            seen[other] = beat.count, beat.outside
    lasts = [r in seen and beat is not None and beat.count - seen[r][0] >= LASTING_BEATS for r, beat in others.items()]
    if not others or not all(lasts):
        return ""
    places = "; ".join(f"rank {r} made fewer calls of the model and waits in {seen[r][1]}" for r in others)
    return (
        f"{places}, while rank {rank} waits for {place}. All ranks must call the model equally often: give loaders of "
        "the same length (drop_last=True, DistributedSampler), or train within `with zgraph.join(model) as joined: for "
        "batch in joined(loader):`"
    )
