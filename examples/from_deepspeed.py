"""A DeepSpeed script with one import changed: torchrun --nproc-per-node 2 examples/from_deepspeed.py

--config names another file of examples/configs. Training is saved halfway, and resumed from there.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import nn

import zgraph as deepspeed  # was: import deepspeed

CONFIGS = Path(__file__).parent / "configs"


class Model(nn.Module):
    """A classifier that returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 4))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.body(x), labels)


def dataset() -> torch.utils.data.Dataset:
    """Points, and in which quarter of the plane the first two coordinates lie."""
    x = torch.randn(256, 32, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.TensorDataset(x, 2 * (x[:, 0] > 0).long() + (x[:, 1] > 0).long())


def engine_of(config: Path):
    """An engine, and a loader of its data."""
    torch.manual_seed(0)
    engine, _, loader, _ = deepspeed.initialize(model=Model(), config=str(config), training_data=dataset())
    return engine, loader


def train(engine, loader, num_steps: int) -> None:
    while engine.global_steps < num_steps:
        for x, labels in loader:
            before = engine.global_steps
            loss = engine(x.to(engine.device), labels.to(engine.device))
            engine.backward(loss)
            engine.step()
            if engine.global_steps > before and engine.global_steps % 4 == 0 and engine.global_rank == 0:
                print(f"step {engine.global_steps:2}: loss {loss.item():.4f}", flush=True)
            if engine.global_steps == num_steps:
                break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=CONFIGS / "zero3.json")
    parser.add_argument("--checkpoints", type=Path, help="a folder that all ranks see")
    asked = parser.parse_args()
    deepspeed.init_distributed()
    folder = asked.checkpoints or shared_folder()
    engine, loader = engine_of(asked.config)
    train(engine, loader, 8)
    engine.save_checkpoint(folder)
    engine, loader = engine_of(asked.config)
    engine.load_checkpoint(folder)
    if engine.global_rank == 0:
        print(f"resumed after step {engine.global_steps}")
    train(engine, loader, 16)


def shared_folder() -> Path:
    """A temporary folder, the same on all ranks of this machine."""
    made = [tempfile.mkdtemp()]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(made)
    return Path(made[0])


if __name__ == "__main__":
    main()
