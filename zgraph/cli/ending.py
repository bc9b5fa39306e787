"""An end within a limit once a signal has asked for it, whatever the process waits for.

A handler in Python runs when what was called in C++ comes back. torchrun waits there for up to 300 s at its exit
barrier, for hosts that are gone already, and holds the port on which ranks meet.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

END_S = 40.0
"""How long torchrun has to end once it is asked to: it gives ranks 30 s, and then kills them."""
ENDS = frozenset((signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT))


@contextmanager
def ended_within(seconds: float) -> Iterator[None]:
    """Within this context, end the process so long after a signal that asks for its end, unless it is left before; its
    children, and what is in their process groups, are killed then.

    Args:
        seconds: for what handles the signal to end by itself.
    """
    asked, tell = os.pipe()
    os.set_blocking(tell, False)
    over = threading.Event()

    def watch() -> None:
        while number := os.read(asked, 1):
            if number[0] in ENDS:
                if not over.wait(seconds):
                    _kill_children()
                    os._exit(128 + number[0])
                return

    thread = threading.Thread(target=watch, name="zgraph-end", daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        os.close(tell)
        thread.join()
        os.close(asked)


def _kill_children() -> None:
    """Kill the children of this process: nobody would end them after it. Those of torchrun have groups of their own."""
    own = os.getpid()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            _, parent, group = path.read_text().rpartition(")")[2].split()[:3]
            if int(parent) != own:
                continue
            if int(group) != os.getpgrp():
                os.killpg(int(group), signal.SIGKILL)
            else:
                os.kill(int(path.parent.name), signal.SIGKILL)
