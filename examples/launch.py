"""Start one process a rank on this machine, hear from the first, and leave none behind.

`torchrun` does this from a shell. Here a program starts its own ranks, so that one command is enough to try zgraph:

    with closing(launch(work, 2, job)) as events:    # work(rank, job) runs in two new processes
        for event in events:                         # whatever the first rank passed to rank.tell
            ...
"""

from __future__ import annotations

import argparse
import os
import queue
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from zgraph.errors import PeerError

HOST = "127.0.0.1"
ECHO_S = 2.0
"""How long to wait, once a rank failed, for another that failed first and says so later."""


class RankFailed(Exception):
    """A rank raised an error or died. The message is the rank's own."""


@dataclass(frozen=True)
class Rank:
    """A rank's own description.

    Args:
        index: 0 to `num_ranks` - 1.
        num_ranks: processes that train together.
        device: a GPU of its own, or the CPU.
        tell: passes an event to the program that launched the ranks. Only the first rank's events arrive.
    """

    index: int
    num_ranks: int
    device: torch.device
    tell: Callable[[object], None]


@dataclass(frozen=True)
class _Failure:
    rank: int
    text: str
    is_echo: bool
    """Whether it only says that another rank is gone."""


def at_least_one(text: str) -> int:
    """A number of ranks or steps from the command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def default_num_ranks() -> int:
    """One rank a GPU; two on a machine without."""
    return torch.cuda.device_count() or 2


def device_kind(num_ranks: int) -> str:
    """ "cuda" where there is a GPU for each rank, else "cpu"."""
    return "cuda" if torch.cuda.device_count() >= num_ranks else "cpu"


def launch(work: Callable[..., None], num_ranks: int, *args: object) -> Generator[Any]:
    """Run `work(rank, *args)` on every rank inside a process group, and yield what the first one tells.

    In every case, Ctrl-C too, all ranks have ended once this is closed.

    Raises:
        RankFailed: a rank failed.
    """
    spawn = mp.get_context("spawn")
    events = spawn.Queue()
    store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]  # a free port
    ranks = [
        spawn.Process(target=_main, args=(work, index, num_ranks, store.port, events, args), daemon=True)
        for index in range(num_ranks)
    ]
    # Ctrl-C reaches every process of the terminal. The ranks inherit that they ignore it, and are ended from here.
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for rank in ranks:
            rank.start()
        signal.signal(signal.SIGINT, on_interrupt)
        yield from _listen(ranks, events)
    except RankFailed:
        for rank in ranks:  # they hear of it from one another, and those that do end in good order
            rank.join(ECHO_S)
        raise
    finally:
        signal.signal(signal.SIGINT, on_interrupt)
        for rank in ranks:
            if rank.is_alive():
                rank.kill()
        for rank in ranks:
            if rank.pid is not None:
                rank.join()


def _listen(ranks: Sequence[Any], events: Any) -> Generator[Any]:
    """Yield events until all ranks have ended well."""
    while True:
        codes = [rank.exitcode for rank in ranks]  # before the look into the queue: what is dead has spoken
        try:
            event = events.get(timeout=0.1)
        except queue.Empty:
            for index, code in enumerate(codes):
                if code:
                    raise RankFailed(f"rank {index} ended with code {code} and said nothing") from None
            if None not in codes:
                return
            continue
        if isinstance(event, _Failure):
            raise RankFailed(_first_cause(event, events).text)
        yield event


def _first_cause(failure: _Failure, events: Any) -> _Failure:
    """A failure that is no echo of another, if one arrives soon."""
    deadline = time.monotonic() + ECHO_S
    while failure.is_echo and (left := deadline - time.monotonic()) > 0:
        try:
            event = events.get(timeout=left)
        except queue.Empty:
            break
        if isinstance(event, _Failure) and not event.is_echo:
            return event
    return failure


# --- in a rank ---------------------------------------------------------------------------------------------------


def _main(
    work: Callable[..., None], index: int, num_ranks: int, port: int, events: Any, args: Sequence[object]
) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.filterwarnings("ignore")
    try:
        device = torch.device("cpu")
        if device_kind(num_ranks) == "cuda":
            device = torch.device("cuda", index)
            torch.cuda.set_device(device)
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_ranks))
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.TCPStore(HOST, port, is_master=False),  # type: ignore[attr-defined]
            rank=index,
            world_size=num_ranks,
            timeout=timedelta(minutes=5),
        )
        work(Rank(index, num_ranks, device, events.put if index == 0 else _ignore), *args)
        dist.destroy_process_group()
    except BaseException as error:
        is_echo = isinstance(error, PeerError | dist.DistError) or "peer" in str(error)
        events.put(_Failure(index, f"rank {index} failed\n\n{traceback.format_exc()}", is_echo))
        raise SystemExit(1) from None


def _ignore(_event: object) -> None:
    pass


def _end_with_parent() -> None:
    parent = mp.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
