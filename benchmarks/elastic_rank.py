"""A rank of an elastic job that writes down each step it takes; and the run of one replica that must be equal to it."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import zgraph
from zgraph.compiler.narrator import Narrator
from zgraph.optim.runs import local

WIDTH, HIDDEN, ROWS = 16, 64, 4
MOST_RANKS = 64
"""Of a replica: each draws rows of its own."""
NAP_S = 0.15
"""How long a step takes at least."""
SAVE_EVERY = 3


def parts() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 1)
    )
    model = zgraph.compile(plain, stage=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 100))


def loss_of(model: nn.Module, step: int, replica: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed((step << 12) + replica * MOST_RANKS + rank)
    x = torch.randn(ROWS, WIDTH, generator=generator)
    return F.mse_loss(model(x), x.sum(1, keepdim=True).tanh())


def digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Of this rank's shards and states."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        states = [value for _, value in sorted(optimizer.state[parameter].items())]
        for tensor in (parameter, *states):
            found.update(local(tensor).detach().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def train(folder: Path, disk: Path, until: int) -> None:
    """A rank of a replica: writes a line for each step, and saves its shards to its host's disk."""
    captures = Counter[str]()
    captured = Narrator.captured

    def counted(self: Narrator, *args: Any, **options: Any) -> None:
        captures["all"] += 1
        captured(self, *args, **options)

    Narrator.captured = counted  # type: ignore[method-assign]
    zgraph.init_distributed()
    torch.set_num_threads(1)
    model, optimizer, schedule = parts()
    run = zgraph.elastic(model, optimizer, state={"schedule": schedule})
    rank = int(os.environ["RANK"])
    with (folder / f"{run.replica}-{rank}-{os.getpid()}.jsonl").open("w", buffering=1) as told:
        for step in run.steps(until):
            loss = loss_of(model, step, run.replica, rank)
            loss.backward()
            time.sleep(NAP_S)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if not run.has_taken:
                continue
            found = [step, run.replicas, loss.item(), digest(model, optimizer), time.monotonic(), captures["all"]]
            told.write(json.dumps(found) + "\n")
            if step % SAVE_EVERY == 0:
                raw = b"".join(local(p).detach().numpy().tobytes() for p in model.parameters())
                with (disk / f"{rank}-{step}.bin").open("wb") as file:
                    file.write(raw)
                    os.fsync(file.fileno())
                for older in set(disk.glob(f"{rank}-*.bin")) - {Path(file.name)}:
                    older.unlink()
            if (folder / "stop").exists() and step >= int((folder / "stop").read_text()):
                os._exit(0)


def reference(folder: Path, members: Sequence[Sequence[int]]) -> None:
    """The same run on one replica's ranks: each step, the micro-batches of these replicas one after another."""
    zgraph.init_distributed()
    torch.set_num_threads(1)
    model, optimizer, schedule = parts()
    rank = int(os.environ["RANK"])
    with (folder / f"reference-{rank}.jsonl").open("w") as told:
        for step, replicas in enumerate(members):
            each, losses = [], {}
            for replica in replicas:
                loss = loss_of(model, step, replica, rank)
                loss.backward()
                losses[replica] = loss.item()
                each.append([local(p.grad).clone() for p in model.parameters()])
                if replica != replicas[-1]:
                    optimizer.zero_grad()
            for parameter, first, *others in zip(model.parameters(), *each, strict=True):
                for other in others:
                    first.add_(other)
                local(parameter.grad).copy_(first.div_(len(replicas)))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            told.write(json.dumps([losses, digest(model, optimizer)]) + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        train(Path(sys.argv[1]), Path(sys.argv[2]), until=1 << 30)
    else:
        reference(Path(sys.argv[1]), json.loads((Path(sys.argv[1]) / "members.json").read_text()))
