"""Small LightningModules and a Trainer of them, the same whatever its strategy."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ROWS, WIDTH, CLASSES = 24, 6, 3

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 11), nn.LayerNorm(11), nn.Tanh(), nn.Linear(11, CLASSES))


class Told(LightningModule):
    """Keeps the losses of its steps, of which each rank has its own."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[float] = []

    def loss(self, batch: Any) -> torch.Tensor:
        raise NotImplementedError

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        self.told.append(loss.item())
        return loss

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class Whole(Told):
    """The model is the LightningModule itself, with a parameter of its own that has no dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) * self.scale

    def loss(self, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


class Parts(Told):
    """Two modules that the steps call."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()
        self.head = nn.Linear(CLASSES, CLASSES)
        self.criterion = nn.CrossEntropyLoss()

    def loss(self, batch: Any) -> torch.Tensor:
        return self.criterion(self.head(self.body(batch[0])), batch[1])


def loader(batch: int = 2) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(ROWS, WIDTH, generator=generator), torch.randint(CLASSES, (ROWS,), generator=generator)
    return DataLoader(TensorDataset(*rows), batch)


def trainer(folder: Path, strategy: Any, devices: int = 1, **options: Any) -> Trainer:
    """A Trainer of two epochs, whose steps are two batches, clipped."""
    chosen = {
        "accelerator": "cpu",
        "devices": devices,
        "max_epochs": 2,
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.5,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": str(folder),
        "num_sanity_val_steps": 0,
    }
    return Trainer(strategy=strategy, **{**chosen, **options})


def launched(rank: int) -> None:
    """Words of a launcher to one of several processes on this host."""
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0")
