"""Cost of the control plane: what a rank that waits pays, how late an agreement is, how soon a dead rank is named.

Up to 32 ranks are processes that train a tiny model over gloo. More are simulated: the real heartbeats and comparisons,
each with connections of its own to one real TCPStore, as threads of a few processes.

One rank comes late to a comparison that all others wait in; then one dies while all others wait for it.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import zgraph
from benchmarks import results
from zgraph.bridge import private_runtime
from zgraph.compiler.compiled_model import compiled_model
from zgraph.errors import ZgraphError
from zgraph.runtime import gloo_transport
from zgraph.runtime.heartbeat import Heartbeat
from zgraph.runtime.journal import ranks_word
from zgraph.runtime.meetings import Meetings

MOST_PROCESSES = 32
RANKS_A_PROCESS = 256
SETTLE_S = 0.75
"""How long after all others have come to wait until their questions are counted: then they wait, and nothing else."""
LONE_S = 2.0
"""How long all others have waited when a rank dies."""
LIMIT_S = 300.0
WIDTH = 8
DIALLING = get_context("fork").BoundedSemaphore(4)
"""Held by who connects: for each connection torch's client asks the resolver for the name of the store's host."""
RESOLVER = "timeout:1 attempts:1"
"""How the resolver asks: one that is asked by thousands on one machine drops questions."""
SWITCH_S = 0.25
"""How long a thread that waits for the interpreter sleeps until it asks for it: those of hundreds of ranks do."""


class Counting:
    """A store that counts what it is asked; its clones count along.

    Args:
        inner: the store.
        asked: questions so far, by the name of the operation, and the keys in them.
    """

    def __init__(self, inner: Any, asked: Counter[str] | None = None) -> None:
        self.inner = inner
        self.asked = Counter[str]() if asked is None else asked

    def clone(self) -> Counting:
        """Another connection."""
        with DIALLING:
            return Counting(self.inner.clone(), self.asked)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.inner, name)
        if name not in ("add", "check", "compare_set", "get", "multi_get", "set", "wait"):
            return found

        def counted(*args: Any) -> Any:
            self.asked[name] += 1
            self.asked["keys"] += len(args[0]) if isinstance(args[0], list) else 1
            return found(*args)

        setattr(self, name, counted)
        return counted

    def num_asked(self) -> tuple[int, int]:
        """Operations so far, and the keys in them."""
        keys = self.asked["keys"]
        return sum(self.asked.values()) - keys, keys


class Census:
    """Counts what ranks ask at two moments of the machine's clock.

    Args:
        stores: of these ranks.
        moments: in seconds of `time.monotonic`, which all processes share.
    """

    def __init__(self, stores: Sequence[Counting], moments: tuple[float, float]) -> None:
        self.stores, self.moments = stores, moments
        self.counts: list[tuple[float, int, int]] = []
        self.thread = threading.Thread(target=self._count, daemon=True)
        self.thread.start()

    def _count(self) -> None:
        for moment in self.moments:
            time.sleep(max(moment - time.monotonic(), 0.0))
            each = [store.num_asked() for store in self.stores]
            self.counts.append((time.monotonic(), sum(n for n, _ in each), sum(k for _, k in each)))

    def result(self) -> tuple[float, float]:
        """Operations and keys a second, of all these ranks."""
        self.thread.join()
        (first, asked, keys), (last, asked_then, keys_then) = self.counts
        return (asked_then - asked) / (last - first), (keys_then - keys) / (last - first)


# --- one rank, real or simulated ---------------------------------------------------------------------------------


def be_late(peers: Meetings, begin: float, late_s: float, late: int) -> float:
    """Come to a comparison at a moment, or later for the one that is late; when it was over."""
    time.sleep(max(begin + late_s * (peers.rank == late) - time.monotonic(), 0.0))
    peers.agree("plans", "the same on all ranks")
    return time.monotonic()


def miss(peers: Meetings, victim: int, wait_for_it: Callable[[], Any]) -> tuple[float, str]:
    """Wait for a rank that is dead or dies; when that was said, and how."""
    try:
        wait_for_it()
    except ZgraphError as error:
        return time.monotonic(), f"{type(error).__name__}: {error}"
    return time.monotonic(), f"rank {peers.rank} did not miss rank {victim}"


def is_named(said: str, victim: int) -> bool:
    """Whether a message says that the rank is gone, and where this one waits."""
    return f"rank {victim} of " in said and "gone" in said and "waited for" in said


# --- simulated ranks ---------------------------------------------------------------------------------------------


def keep_store(pipe: Connection) -> None:
    """Keep the job's store until told to end."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipe.send(store.port)
    pipe.recv()


def simulate(ranks: range, num_ranks: int, port: int, late_s: float, pipe: Connection) -> None:
    """Some of the ranks, two threads each: the main thread, and the heart."""
    threading.stack_size(256 * 1024)
    sys.setswitchinterval(SWITCH_S)
    everyone, late, victim = tuple(range(num_ranks)), num_ranks // 2, num_ranks // 3
    name = f"zgraph/{ranks_word(everyone)}/1"
    made: list[Meetings] = []
    stores = []
    for rank in ranks:
        with DIALLING:
            tcp = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=LIMIT_S))
        stores.append(Counting(dist.PrefixStore("job", tcp)))
        heart: Any = Heartbeat(stores[-1], rank)  # type: ignore[arg-type]
        made.append(Meetings(heart, everyone, name, LIMIT_S))

    def each(job: Callable[[Meetings], Any], of: Sequence[Meetings]) -> list[Any]:
        found: list[Any] = [None] * len(of)

        def one(index: int) -> None:
            found[index] = job(of[index])

        threads = [threading.Thread(target=one, args=(index,)) for index in range(len(of))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    each(lambda peers: peers.agree("start", ""), made)
    pipe.send("ready")
    begin: float = pipe.recv()
    census = Census(stores, (begin + SETTLE_S, begin + late_s))
    ends = each(lambda peers: be_late(peers, begin, late_s, late), made)
    pipe.send((max(ends), *census.result(), sum(store.num_asked()[0] for store in stores)))
    death: float = pipe.recv()

    def die(peers: Meetings) -> tuple[float, str] | None:
        if peers.rank == victim:
            time.sleep(max(death - time.monotonic(), 0.0))
            peers.heart.over.set()  # it beats no more, and says nothing
            return None
        return miss(peers, victim, lambda: peers.agree("more plans", ""))

    pipe.send([found for found in each(die, made) if found is not None])
    pipe.recv()
    os._exit(0)  # nobody says goodbye


def simulated(num_ranks: int, late_s: float) -> dict[str, Any]:
    """Figures of simulated ranks."""
    context = get_context("fork")
    os.environ.setdefault("RES_OPTIONS", RESOLVER)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if most < 2 * num_ranks + 100:
        raise SystemExit(f"{num_ranks} ranks need {2 * num_ranks + 100} open files, and this process may have {most}")
    ours, theirs = context.Pipe()
    keeper = context.Process(target=keep_store, args=(theirs,), daemon=True)
    keeper.start()
    port = ours.recv()
    parts = [range(s, min(s + RANKS_A_PROCESS, num_ranks)) for s in range(0, num_ranks, RANKS_A_PROCESS)]
    workers = Workers(context, [(simulate, (part, num_ranks, port, late_s)) for part in parts])
    try:
        workers.answers()
        begin = time.monotonic() + 2.0
        workers.tell(begin)
        found = workers.answers()
        ends, asked, keys, totals = zip(*found, strict=True)
        death = time.monotonic() + LONE_S
        workers.tell(death)
        said = [pair for answer in workers.answers() for pair in answer]
    finally:
        workers.stop()
        keeper.kill()
    return figures(num_ranks, late_s, max(ends) - begin, sum(asked), sum(keys), said, death, num_ranks // 3) | {
        "operations_per_rank_in_all": round(sum(totals) / num_ranks, 2),
        "num_processes": len(parts),
    }


# --- real ranks --------------------------------------------------------------------------------------------------


def train(rank: int, num_ranks: int, port: int, late_s: float, pipe: Connection) -> None:
    """One rank that trains a tiny model."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True", "ZGRAPH_LOGS": "none"}
    counting: list[Counting] = []
    own_store, own_messenger = private_runtime.store, gloo_transport.messenger

    def counted() -> Any:
        if not counting:
            counting.append(Counting(own_store()))
        return counting[0]

    private_runtime.store = counted
    gloo_transport.messenger = lambda store, *args: own_messenger(getattr(store, "inner", store), *args)  # type: ignore[assignment]
    zgraph.init_distributed("gloo")
    torch.manual_seed(0)
    model = zgraph.compile(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 4)), stage=3)
    inputs = torch.ones(3, WIDTH)

    def step() -> None:
        model(inputs).sum().backward()

    for _ in range(2):
        step()
    peers, late, victim = compiled_model(model).session.peers, num_ranks // 2, num_ranks // 3
    pipe.send("ready")
    begin: float = pipe.recv()
    census = Census(counting, (begin + SETTLE_S, begin + late_s))
    pipe.send((be_late(peers, begin, late_s, late), *census.result(), counting[0].num_asked()[0]))
    begin = pipe.recv()
    census = Census(counting, (begin + SETTLE_S, begin + late_s))
    time.sleep(max(begin + late_s * (rank == late) - time.monotonic(), 0.0))
    step()
    pipe.send(census.result())
    death: float = pipe.recv()
    if rank == victim:
        time.sleep(max(death - time.monotonic(), 0.0))
        os.kill(os.getpid(), signal.SIGKILL)
    pipe.send([miss(peers, victim, step)])
    pipe.recv()
    os._exit(0)


def trained(num_ranks: int, late_s: float) -> dict[str, Any]:
    """Figures of ranks that are processes."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.control_plane", "torch._dynamo.convert_frame"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    workers = Workers(context, [(train, (rank, num_ranks, store.port, late_s)) for rank in range(num_ranks)])
    try:
        workers.answers()
        begin = time.monotonic() + 1.0
        workers.tell(begin)
        ends, asked, keys, totals = zip(*workers.answers(), strict=True)
        workers.tell(time.monotonic() + 1.0)
        in_step = sum(found for found, _ in workers.answers())
        death = time.monotonic() + LONE_S
        workers.tell(death)
        said = [pair for answer in workers.answers(without=num_ranks // 3) for pair in answer]
    finally:
        workers.stop()
    return figures(num_ranks, late_s, max(ends) - begin, sum(asked), sum(keys), said, death, num_ranks // 3) | {
        "operations_per_rank_and_second_in_a_step": round(in_step / num_ranks, 3),
        "operations_per_rank_in_all": round(sum(totals) / num_ranks, 2),
        "num_processes": num_ranks,
    }


# --- both --------------------------------------------------------------------------------------------------------


class Workers:
    """Processes that answer one after the other of what they are told.

    Args:
        context: of multiprocessing.
        jobs: a function and its arguments for each, after which it is given the end of a pipe.
    """

    def __init__(self, context: Any, jobs: Sequence[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        self.pipes: list[Connection] = []
        self.processes: list[BaseProcess] = []
        for job, args in jobs:
            ours, theirs = context.Pipe()
            process = context.Process(target=job, args=(*args, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def tell(self, word: Any) -> None:
        """Tell all of them the same."""
        for pipe in self.pipes:
            pipe.send(word)

    def answers(self, without: int = -1) -> list[Any]:
        """The next answer of each of them, in their order, of one none. Raises SystemExit if one ends before it."""
        waiting = {pipe: index for index, pipe in enumerate(self.pipes) if index != without}
        found: dict[int, Any] = {}
        while waiting:
            ready = wait([*waiting], LIMIT_S)
            if not ready:
                raise SystemExit(f"processes {sorted(waiting.values())} have not answered for {LIMIT_S:g} s")
            for pipe in ready:
                index = waiting.pop(pipe)  # type: ignore[arg-type]
                try:
                    found[index] = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    raise SystemExit(f"process {index} has ended: see above") from None
        return [found[index] for index in sorted(found)]

    def stop(self) -> None:
        """Kill them."""
        for process in self.processes:
            process.kill()
            process.join()


def figures(
    num_ranks: int,
    late_s: float,
    delay_s: float,
    asked: float,
    keys: float,
    said: Sequence[tuple[float, str]],
    death: float,
    victim: int,
) -> dict[str, Any]:
    """Measurements by name. Raises SystemExit if a rank did not say who is dead."""
    unnamed = [text for _, text in said if not is_named(text, victim)]
    if unnamed or len(said) != num_ranks - 1:
        raise SystemExit(f"{len(said)} of {num_ranks - 1} ranks spoke; rank {victim} is not named in: {unnamed[:1]}")
    return {
        "ranks": num_ranks,
        "late_s": late_s,
        "operations_per_rank_and_second": round(asked / num_ranks, 3),
        "keys_per_rank_and_second": round(keys / num_ranks, 3),
        "delay_s": round(delay_s, 3),
        "over_late_s": round(delay_s - late_s, 3),
        "named_dead_s": round(max(at for at, _ in said) - death, 3),
        "first_named_dead_s": round(min(at for at, _ in said) - death, 3),
        "said": min(said)[1],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 128, 1024, 4096], help="how many; one or more")
    parser.add_argument("--late", type=float, default=3.0, help="seconds that one rank comes late")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if min(options.ranks) < 2 or options.late < 2 * SETTLE_S:
        parser.error(f"two ranks or more, and {2 * SETTLE_S:g} s or more")
    rows = []
    for num_ranks in options.ranks:
        rows.append((trained if num_ranks <= MOST_PROCESSES else simulated)(num_ranks, options.late))
        print("  ".join(f"{name}: {value}" for name, value in rows[-1].items() if name != "said"), flush=True)
    if len(rows) == 1:
        results.write(options.json, **rows[0])
    else:
        results.write(options.json, rows=rows)


if __name__ == "__main__":
    main()
