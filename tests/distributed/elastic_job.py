"""Elastic jobs of forked processes, whose faults are planned, and the run in one process that they must be equal to."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor

import zgraph
from zgraph.bridge.private_runtime import tcp_store
from zgraph.errors import ZgraphError
from zgraph.optim.runs import local

from .pool import IMPORTED

LIMIT_S = 90.0
WIDTH = 6
ALONE_AFTER, ALONE_NAP_S = 12, 0.5
"""From which step on a replica that is alone takes its time, so that the other finds it still training."""


class Plan(NamedTuple):
    """The doings of one life of a replica.

    Args:
        steps: after how many to end.
        num_ranks: of a replica; those of several are compiled.
        stage: that these are compiled at.
        width: of the net.
        engine: whether an engine trains it, with clipping and a scale of the loss.
        nap_s: how long a step takes at least.
        late: a step, and for how many seconds the first rank then does nothing but live.
        faults: signals that a rank sends itself between backward and step, by rank and step.
    """

    steps: int = 12
    num_ranks: int = 1
    stage: int = 3
    width: int = 9
    nap_s: float = 0.02
    engine: bool = False
    late: tuple[int, float] = (-1, 0.0)
    faults: tuple[tuple[int, int, signal.Signals], ...] = ()


class Step(NamedTuple):
    """A step that was taken: by which replicas, this rank's loss, digests of its shards, and of states and draws."""

    number: int
    replicas: tuple[int, ...]
    loss: float
    shards: str
    states: str


def net(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, width), nn.Tanh(), nn.Linear(width, 1))


def batch(step: int, replica: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1000 * step + 10 * replica + rank))
    return x, x.sum(1, keepdim=True).tanh()


def digest(tensors: Iterable[Any]) -> str:
    raw = [local(t).detach().contiguous().numpy().tobytes() for t in tensors if isinstance(t, torch.Tensor | DTensor)]
    return hashlib.sha256(b"".join(raw)).hexdigest()[:12]


def parts(model: nn.Module, plan: Plan) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 5))


def engine_of(model: nn.Module, plan: Plan) -> Any:
    if plan.num_ranks == 1:
        zgraph.init_distributed()
    made, *_ = zgraph.initialize_engine(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": 8,
            "gradient_clipping": 0.1,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
            "zero_optimization": {"stage": 2},
        },
    )
    return made


def train(plan: Plan, variables: Mapping[str, str], pipe: Connection) -> None:
    """A rank of a replica: tells each step, and how it ended."""
    torch.set_num_threads(1)
    os.environ |= variables
    rank = int(variables["RANK"])
    try:
        model = net(plan.width)
        if plan.num_ranks > 1:
            zgraph.init_distributed()
            model = zgraph.compile(model, stage=plan.stage)
        engine = engine_of(model, plan) if plan.engine else None
        if engine is not None:
            model, optimizer, schedule = engine.module, engine.optimizer, engine.lr_scheduler
            state = engine.elastic_state
        else:
            model, optimizer, schedule = parts(model, plan)
            state = {"schedule": schedule}
        run = zgraph.elastic(model, optimizer, state=state, rng=True)
        for step in run.steps(plan.steps):
            x, y = batch(step, run.replica, rank)
            loss = (model(x) - y).square().mean()
            (loss if engine is None else engine.scale(loss)).backward()
            drawn = torch.rand(3)
            nap_s = plan.nap_s if run.num_replicas != 1 or step < ALONE_AFTER else ALONE_NAP_S
            time.sleep(plan.late[1] if (rank, step) == (0, plan.late[0]) else nap_s)
            for victim, at, fault in () if run.is_rehearsing else plan.faults:
                if (rank, step) == (victim, at):
                    os.kill(os.getpid(), fault)
            if engine is None:
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            else:
                engine.step()
            if run.has_taken:
                assert engine is None or engine.global_steps == run.step
                states = [value for p in model.parameters() for _, value in sorted(optimizer.state[p].items())]
                found = Step(step, run.replicas, loss.item(), digest(model.parameters()), digest([*states, drawn]))
                pipe.send(("step", found))
        pipe.send(("done", (run.step, run.num_lost)))
    except ZgraphError as error:
        pipe.send((type(error).__name__, str(error)))


class Job:
    """Replicas around a store in this process. `told` has what each life of each of their ranks has said."""

    def __init__(self, least: int, most: int, gone_s: float = 1.0, timeout_s: float = 20.0) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(IMPORTED))
        self.store, port = tcp_store("localhost", 0, timedelta(seconds=30), serves=True)
        self.shared = {
            "ZGRAPH_ELASTIC_STORE": f"127.0.0.1:{port}",
            "ZGRAPH_ELASTIC": f"{least}:{most}",
            "ZGRAPH_ELASTIC_GONE": str(gone_s),
            "ZGRAPH_TIMEOUT": str(timeout_s),
            "MASTER_ADDR": "127.0.0.1",
        }
        self.told: dict[tuple[int, int, int], list[tuple[str, Any]]] = {}
        self._pipes: dict[Connection, tuple[int, int, int]] = {}
        self._processes: list[Any] = []
        self._stores: list[Any] = []
        self._lives: dict[int, int] = {}

    def start(self, replica: int, plan: Plan) -> None:
        """Start a life of a replica."""
        life = self._lives[replica] = self._lives.get(replica, 0) + 1
        inner, port = tcp_store("localhost", 0, timedelta(seconds=30), serves=True)
        self._stores.append(inner)
        for rank in range(plan.num_ranks):
            own = {"RANK": str(rank), "WORLD_SIZE": str(plan.num_ranks), "MASTER_PORT": str(port)}
            own |= {"ZGRAPH_ELASTIC_REPLICA": str(replica), "TORCHELASTIC_USE_AGENT_STORE": "True", **self.shared}
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=train, args=(plan, own, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes[ours] = replica, life, rank
            self.told[replica, life, rank] = []

    def listen(self, until: tuple[int, int, int] | None = None, word: str = "", most: int = 1) -> None:
        """Take what is told, until this rank has said this word so often; by default until all have ended."""
        end = time.monotonic() + LIMIT_S
        while self._pipes:
            if until is not None and sum(said == word for said, _ in self.told[until]) >= most:
                return
            left = end - time.monotonic()
            assert left > 0, f"nothing more was told: { {key: told[-1:] for key, told in self.told.items()} }"
            for pipe in wait(list(self._pipes), left):
                assert isinstance(pipe, Connection)
                try:
                    self.told[self._pipes[pipe]].append(pipe.recv())
                except (EOFError, OSError):
                    del self._pipes[pipe]

    def end_replica(self, replica: int, life: int) -> None:
        """Kill all ranks of a life, stopped ones too."""
        for pipe, place in list(self._pipes.items()):
            if place[:2] == (replica, life):
                self._processes[[*self.told].index(place)].kill()
                del self._pipes[pipe]

    def steps(self, replica: int, life: int, rank: int = 0) -> list[Step]:
        return [found for word, found in self.told[replica, life, rank] if word == "step"]

    def end(self) -> None:
        for process in self._processes:
            with suppress(ProcessLookupError):
                process.kill()
            process.join()


def reference(members: list[tuple[int, ...]], plan: Plan) -> list[Step]:
    """The same training in one process: each step, the micro-batches of these replicas and of no others."""
    model, optimizer, schedule = parts(net(plan.width), plan)
    found = []
    for step, replicas in enumerate(members):
        gradients = []
        losses = {}
        drawn = torch.rand(3)
        for replica in replicas:
            x, y = batch(step, replica, 0)
            loss = (model(x) - y).square().mean()
            losses[replica] = loss.item()
            gradients.append(torch.autograd.grad(loss, [*model.parameters()]))
        for parameter, *each in zip(model.parameters(), *gradients, strict=True):
            total = each[0].clone()
            for one in each[1:]:
                total += one
            parameter.grad = total / len(each)
        optimizer.step()
        schedule.step()
        states = [value for p in model.parameters() for _, value in sorted(optimizer.state[p].items())]
        found.append(Step(step, replicas, losses[replicas[0]], digest(model.parameters()), digest([*states, drawn])))
    return found
