"""Why a process of the job ended: it leaves word in the store, for those that wait for it.

The call of a model itself tells of failures within it. This is for failures between calls (a data loader, an optimizer
that is out of memory), and for a script that ends while the others go on.
"""

from __future__ import annotations

import atexit
import sys
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from types import TracebackType

from zgraph.bridge.private_runtime import Store
from zgraph.runtime.advice import advice
from zgraph.runtime.alarms import Alarm, raise_alarm
from zgraph.runtime.interrupts import quiet
from zgraph.runtime.journal import begun

LINGER_SECONDS = 1.5
"""How long a process that failed stays, as the store may end with it: the others read alarms at each beat."""
_died_threads: list[str] = []


@lru_cache(maxsize=1)
def watch(store: Store, rank: int, reason: Callable[[], str]) -> None:
    """Leave word of this process's end, whichever it is. Hooks that are there already run as before.

    Args:
        store: where the ranks tell one another.
        rank: this one.
        reason: why this rank could not go on, if its heartbeat has found out; it is noted on the error that ends it.
    """
    before, before_thread = quiet(sys.excepthook), threading.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        for words in (advice(error), reason()):
            if words and words not in str(error):
                error.add_note(words)
        before(kind, error, trace)
        _leave(store, rank, f"ended by {kind.__name__}: {error}"[:2000])
        time.sleep(LINGER_SECONDS)  # the store may end with this process: let the others read first

    def thread_hook(args: threading.ExceptHookArgs) -> None:
        before_thread(args)
        name = args.thread.name if args.thread is not None else "a thread"
        _died_threads[:] = [f" (its thread {name} had died of {args.exc_type.__name__}: {args.exc_value})"[:2000]]

    sys.excepthook, threading.excepthook = hook, thread_hook
    atexit.register(_leave, store, rank, "came to the end of its script")


def _leave(store: Store, rank: int, how: str) -> None:
    """Raise an alarm, unless this process has said before that it ends."""
    try:
        if store.add(f"zgraph/left/{rank}", 1) == 1:
            raise_alarm(store, Alarm("left", "", rank, how + "".join(_died_threads), begun()))
    except (RuntimeError, ValueError):
        return  # the store is gone: the others are told by the broken connections
