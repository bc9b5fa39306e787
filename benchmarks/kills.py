"""Kill a random rank at a random moment of starting, training and saving, again and again, and go on each time.

Every restart must go on from a complete checkpoint, and from none older than the last whose saving had returned; every
step must have the loss that it has without kills; and the ranks that live on must end by themselves.

With copies in memory, each rank is on a host of its own, which is a folder; with half of the ranks that are killed
their hosts are lost. Training then goes on from the newest copies that are complete, if these are newer.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import zgraph
from benchmarks import results
from zgraph.errors import ZgraphError

IMPORTED = ("zgraph", "zgraph.engine.initialize", "torch._dynamo.convert_frame", "torch._functorch.aot_autograd")
ROWS, WIDTH, HIDDEN = 12, 64, 512
SAVE_EVERY = 2
HANG_S = 60.0
"""How long the others may take to end after a kill."""
START_S = 300.0
"""How long all may take to the first step."""
TRAINING_S = 0.6
"""How long a round trains at most before a rank is killed."""
STARTING_S = 4.0
"""How long after it has joined the others a rank is killed at most, in rounds that kill while it starts."""
STARTING_SHARE = 0.2
"""Of all rounds, those that kill while the rank starts."""


class Killed(AssertionError):
    """Training did not go on as if nobody had been killed."""


@dataclass
class Outcome:
    """Observations over all rounds.

    Args:
        num_kills: ranks that were killed.
        resumed: the step at which each round went on.
        ended_s: how long the other ranks took to end after a kill, the slowest of each round.
        moments: what the killed rank had told last.
        num_steps: different steps whose losses were compared with those of the run without kills.
        num_repeated: steps that were made more than once.
        num_hosts_lost: kills after which the copies of the rank's host were lost, too.
        from_memory: rounds that went on between two checkpoints on disk.
    """

    num_kills: int = 0
    resumed: list[int] = field(default_factory=list)
    ended_s: list[float] = field(default_factory=list)
    moments: dict[str, int] = field(default_factory=dict)
    num_steps: int = 0
    num_repeated: int = 0
    num_hosts_lost: int = 0
    from_memory: int = 0


class Net(nn.Module):
    """As much as takes a while to write."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(self.last(self.drop(F.gelu(self.first(x)))), y)


def host_of(folder: Path, rank: int) -> Path:
    """The folder that is the memory of a rank's host."""
    return folder / f"host{rank}"


def train(
    rank: int, num_ranks: int, port: int, folder: Path, asynchronous: bool, memory: bool, steps: int, pipe: Connection
) -> None:
    """A rank: goes on from the last checkpoint, and tells what it does.

    Args:
        rank, num_ranks, port: of the process group.
        folder: of the checkpoints.
        asynchronous: whether they are written while training goes on.
        memory: whether each step is also copied to the memory of hosts.
        steps: after how many to end.
        pipe: takes pairs of a word and a number.
    """
    torch.set_num_threads(1)
    copies = {"every": int(memory), "job": "kills", "folder": str(host_of(folder, rank))}
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    try:
        zgraph.init_distributed()
        pipe.send(("joined", None))
        engine, *_ = zgraph.initialize_engine(
            model=Net(),
            config={
                "train_batch_size": ROWS,
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
                "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
                "zero_optimization": {"stage": 3},
                "checkpoint": {"asynchronous": asynchronous, "memory": copies},
            },
        )
        torch.manual_seed(rank)
        pipe.send(("sharded", None))
        engine.load_checkpoint(folder / "disk")
        pipe.send(("resumed", engine.global_steps))
        pending = None
        while engine.global_steps < steps:
            step = engine.global_steps
            generator = torch.Generator().manual_seed(step)
            x, y = (torch.randn(ROWS, WIDTH, generator=generator).chunk(num_ranks)[rank] for _ in range(2))
            loss = engine(x, y)
            engine.backward(loss)
            engine.step()
            pipe.send(("step", (step, loss.item())))
            if engine.global_steps % SAVE_EVERY == 0:
                pipe.send(("saving", engine.global_steps))
                engine.save_checkpoint(folder / "disk")
                if pending is not None or not asynchronous:
                    pipe.send(("saved", pending if asynchronous else engine.global_steps))
                pending = engine.global_steps
        engine.wait_for_checkpoint()
        pipe.send(("done", engine.global_steps))
    except (ZgraphError, RuntimeError) as error:
        pipe.send(("failed", f"{type(error).__name__}: {error}"))


class Round:
    """The processes of one start, and what they have told."""

    def __init__(self, num_ranks: int, folder: Path, asynchronous: bool, memory: bool, steps: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(IMPORTED))
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.processes: list[BaseProcess] = []
        self.pipes: list[Connection] = []
        self.last = ["starting"] * num_ranks
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            args = (rank, num_ranks, self.store.port, folder, asynchronous, memory, steps, theirs)
            process = context.Process(target=train, args=args, daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def told(self, until: float) -> Iterator[tuple[int, str, Any]]:
        """Messages of the ranks until this moment of the monotonic clock, or until all of them have ended."""
        open_pipes = {pipe: rank for rank, pipe in enumerate(self.pipes) if not pipe.closed}
        while open_pipes and (left := until - time.monotonic()) > 0:
            for pipe in wait(list(open_pipes), left):
                assert isinstance(pipe, Connection)
                try:
                    word, value = pipe.recv()
                except (EOFError, OSError):
                    del open_pipes[pipe]
                    continue
                self.last[open_pipes[pipe]] = word
                yield open_pipes[pipe], word, value

    def end(self) -> None:
        """Leave no process behind."""
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self.pipes:
            pipe.close()


class Campaign:
    """Rounds on the same folder.

    Args:
        folder: of the checkpoints.
        num_ranks: of every round.
        seed: of ranks, moments, and ways of saving.
        memory: whether each step is also copied to the memory of hosts.
    """

    def __init__(self, folder: Path, num_ranks: int, seed: int, memory: bool) -> None:
        self.folder, self.num_ranks, self.random = folder, num_ranks, random.Random(seed)
        self.memory = memory
        self.outcome = Outcome()
        self.saved = 0
        self.losses: dict[tuple[int, int], float] = {}

    def kill_once(self) -> None:
        """Start, kill a rank, and wait for the others.

        Raises:
            Killed: training has not gone on as it must, or the others have not ended.
        """
        victim, is_starting = self.random.randrange(self.num_ranks), self.random.random() < STARTING_SHARE
        first, longest_s = ("joined", STARTING_S) if is_starting else ("step", TRAINING_S)
        started = Round(self.num_ranks, self.folder, self.random.random() < 0.5, self.memory, steps=1 << 30)
        try:
            for rank, word, value in started.told(time.monotonic() + START_S):
                self._note(rank, word, value)
                if rank == victim and word == first:
                    break
            else:
                raise Killed(f"rank {victim} not {first} within {START_S:g} s; the ranks told {started.last} at last")
            self._listen(started, time.monotonic() + self.random.uniform(0, longest_s))
            moment = started.last[victim]
            self.outcome.moments[moment] = self.outcome.moments.get(moment, 0) + 1
            started.processes[victim].kill()
            began = time.monotonic()
            self._listen(started, began + HANG_S)
            for process in started.processes:
                process.join(max(0.0, began + HANG_S - time.monotonic()))
            if any(process.is_alive() for process in started.processes):
                raise Killed(f"a rank lives on {HANG_S:g} s after rank {victim} was killed, having told {started.last}")
            self.outcome.ended_s.append(time.monotonic() - began)
            self.outcome.num_kills += 1
        finally:
            started.end()
        if self.memory and self.random.random() < 0.5:
            shutil.rmtree(host_of(self.folder, victim), ignore_errors=True)
            self.outcome.num_hosts_lost += 1

    def compare(self) -> None:
        """Compare every loss with that of a run without kills.

        Raises:
            Killed: one differs.
        """
        steps = 1 + max((step for _, step in self.losses), default=0)
        with tempfile.TemporaryDirectory() as folder:
            plain = Round(self.num_ranks, Path(folder), False, False, steps)
            try:
                expected = {
                    (rank, value[0]): value[1]
                    for rank, word, value in plain.told(time.monotonic() + START_S + steps)
                    if word == "step"
                }
            finally:
                plain.end()
        for place, loss in self.losses.items():
            if loss != expected.get(place):
                raise Killed(f"rank {place[0]} has loss {loss} in step {place[1]}, and {expected.get(place)} unkilled")
        self.outcome.num_steps = steps

    def _listen(self, started: Round, until: float) -> None:
        for rank, word, value in started.told(until):
            self._note(rank, word, value)

    def _note(self, rank: int, word: str, value: Any) -> None:
        if word == "resumed":
            if value < self.saved or (value % SAVE_EVERY and not self.memory):
                raise Killed(f"rank {rank} went on from step {value}, and step {self.saved} had been saved")
            if rank == 0:
                self.outcome.resumed.append(value)
                self.outcome.from_memory += bool(value % SAVE_EVERY)
        elif word == "saved":
            self.saved = max(self.saved, value)
        elif word == "step":
            step, loss = value
            if (held := self.losses.setdefault((rank, step), loss)) != loss:
                raise Killed(f"rank {rank} had loss {held} in step {step}, and {loss} when the step was made again")
            self.outcome.num_repeated += held is not loss


def run(num_kills: int, num_ranks: int = 3, seed: int = 0, *, memory: bool = False) -> Outcome:
    """Kill so many times, and compare.

    Raises:
        Killed: training did not go on as it must.
    """
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder), num_ranks, seed, memory)
        for number in range(1, num_kills + 1):
            campaign.kill_once()
            if number % 10 == 0:
                print(f"{number} kills, {1 + max(campaign.losses)[1]} steps", flush=True)
        campaign.compare()
    return campaign.outcome


def run_all(num_kills: int, num_ranks: int, seed: int, num_campaigns: int, *, memory: bool) -> Outcome:
    """Divide the kills among campaigns beside each other, which wait much of their time.

    Raises:
        Killed: in one of them training did not go on as it must.
    """
    shares = [num_kills // num_campaigns + (at < num_kills % num_campaigns) for at in range(num_campaigns)]
    with ThreadPoolExecutor(num_campaigns) as pool:
        found = list(pool.map(lambda at: run(shares[at], num_ranks, seed + at, memory=memory), range(num_campaigns)))
    return Outcome(
        sum(o.num_kills for o in found),
        [at for o in found for at in o.resumed],
        [s for o in found for s in o.ended_s],
        dict(sum((Counter(o.moments) for o in found), Counter())),
        sum(o.num_steps for o in found),
        sum(o.num_repeated for o in found),
        sum(o.num_hosts_lost for o in found),
        sum(o.from_memory for o in found),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--campaigns", type=int, default=1, help="trainings beside each other, each with its share")
    parser.add_argument("--memory", action="store_true", help="copy each step to the memory of hosts, and lose hosts")
    parser.add_argument("--json", type=Path, help="where to write what was found")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    outcome = run_all(options.kills, options.ranks, options.seed, options.campaigns, memory=options.memory)
    print(f"{outcome.num_kills} kills, {outcome.num_steps} steps as without kills, {time.monotonic() - began:.0f} s")
    if options.memory:
        print(
            f"{outcome.num_hosts_lost} hosts lost; {outcome.from_memory} rounds went on between two checkpoints on disk"
        )
    print(f"the others ended within {max(outcome.ended_s):.1f} s; when killed, ranks were at {outcome.moments}")
    results.write(
        options.json,
        num_ranks=options.ranks,
        seed=options.seed,
        num_campaigns=options.campaigns,
        slowest_end_s=max(outcome.ended_s),
        seconds=time.monotonic() - began,
        **asdict(outcome),
    )


if __name__ == "__main__":
    main()
