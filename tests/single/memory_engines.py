"""Engines of one rank that keep copies of their shards in memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

import zgraph
from zgraph.engine.checkpoint.memory import shelf as shelf_module
from zgraph.engine.checkpoint.memory.shelf import Mark, Shelf
from zgraph.engine.engine import Engine

MARK = Mark(1, 4, "0" * 16)


def engine_of(folder: Path, **memory: Any) -> Engine:
    torch.manual_seed(0)
    keys = {"every": 2, "job": "alone", "folder": str(folder), **memory}
    config = {"train_batch_size": 4, "optimizer": {"type": "AdamW"}, "checkpoint": {"memory": keys}}
    return zgraph.initialize_engine(model=nn.Linear(6, 5), config=config)[0]  # type: ignore[arg-type]


def step(engine: Engine) -> float:
    loss = engine(torch.rand(4, 6)).square().mean()
    engine.backward(loss)
    engine.step()
    return loss.item()


def settled(engine: Engine) -> None:
    kept = engine._checkpoints.copies
    assert kept is not None
    kept.wait()


def killed() -> None:
    """Give up the locks of this process, as its end does."""
    while shelf_module._HELD:
        os.close(shelf_module._HELD.popitem()[1][0])


def marks(folder: Path) -> list[int]:
    """The steps of the copies in a folder."""
    return sorted(mark.step for mark, _ in Shelf.of(folder, "alone").copies())
