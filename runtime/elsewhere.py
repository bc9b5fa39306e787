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
_TORCH = "/torch/distributed/"
_OURS = ("/runtime/peers.py",)


class Lookout:
    """Looks where the main thread of this process waits.

    Args:
        store: where it is told.
        rank: this one.
    """

    def __init__(self, store: Store, rank: int) -> None:
        self.store, self.rank = store, rank
        self._seen, self._since, self._told = "", 0.0, ""

    def look(self) -> None:
        """Tell of a wait that has become long, and that it is over."""
        main = sys._current_frames().get(threading.main_thread().ident or 0)
        place = waits_at(main)
        if place != self._seen:
            self._seen, self._since = place, time.monotonic()
        word = place if place and time.monotonic() - self._since >= AFTER_SECONDS else ""
        if word != self._told:
            self._told = word
            self.store.set(_key(self.rank), word)


def waits_at(frame: FrameType | None) -> str:
    """The function of torch.distributed that a thread is in, and the line that called it; empty if it is in none."""
    name = ""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.endswith(_OURS):
            return ""
        if _TORCH in file and frame.f_code.co_name != "wrapper":
            name = frame.f_code.co_name
        elif name and "/torch/" not in file:
            return f"torch.distributed's {name} ({Path(file).name}:{frame.f_lineno})"
        frame = frame.f_back
    return ""


def elsewhere(store: Store, rank: int, ranks: Sequence[int], place: str, waiting: Sequence[int]) -> str:
    """Says which rank waits outside of the model, if no rank can go on; else empty.

    Args:
        store: where ranks tell.
        rank: this one, which waits in a call of the model.
        ranks: all that take part.
        place: what this one waits for.
        waiting: the ranks that wait in calls of the model, this one among them.
    """
    others = [r for r in ranks if r not in waiting]
    if not others or not all(store.check([_key(r)]) for r in others):
        return ""
    words = {r: store.get(_key(r)).decode() for r in others}
    if not all(words.values()):
        return ""
    places = "; ".join(f"rank {r} made fewer calls of the model and waits in {word}" for r, word in words.items())
    return (
        f"{places}, while rank {rank} waits for {place}. All ranks must call the model equally often: give loaders of "
        "the same length (drop_last=True, DistributedSampler), or train within `with zgraph.join(model) as joined: for "
        "batch in joined(loader):`"
    )


def _key(rank: int) -> str:
    return f"zgraph/elsewhere/{rank}"
