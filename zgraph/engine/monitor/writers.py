"""Where an engine's numbers go, besides its own lines: files of comma-separated values, TensorBoard, Weights & Biases.

Names and files are those that DeepSpeed's monitors write.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from zgraph.engine.config.keys import EngineConfig, Monitor, WandB

PACKAGES = ("tensorboard", "wandb")
"""Sections of a configuration that need a package of the same name."""


class Event(NamedTuple):
    """A number, at so many rows (of all ranks) since training began."""

    name: str
    value: float
    rows: int


class Writer(Protocol):
    """Takes the events of a step."""

    def write(self, events: Sequence[Event]) -> None: ...


class CsvWriter:
    """One file for each name: `Train/Samples/lr` goes to `output_path/job_name/Train_Samples_lr.csv`."""

    def __init__(self, keys: Monitor) -> None:
        self.folder = Path(keys.output_path, keys.job_name)
        self.folder.mkdir(parents=True, exist_ok=True)

    def write(self, events: Sequence[Event]) -> None:
        for event in events:
            path = self.folder / f"{event.name.replace('/', '_')}.csv"
            is_new = not path.exists()
            with path.open("a", newline="") as file:
                rows = csv.writer(file)
                if is_new:
                    rows.writerow(["step", event.name.rpartition("/")[2]])
                rows.writerow([event.rows, event.value])


class TensorBoardWriter:
    """TensorBoard's files, in the folder `output_path/job_name`."""

    def __init__(self, keys: Monitor) -> None:
        tensorboard = import_module("torch.utils.tensorboard")
        self.summary = tensorboard.SummaryWriter(log_dir=str(Path(keys.output_path, keys.job_name)))

    def write(self, events: Sequence[Event]) -> None:
        for event in events:
            self.summary.add_scalar(event.name, event.value, event.rows)
        self.summary.flush()


class WandBWriter:
    """A run of Weights & Biases."""

    def __init__(self, keys: WandB) -> None:
        self.run = import_module("wandb").init(project=keys.project, group=keys.group, entity=keys.team)

    def write(self, events: Sequence[Event]) -> None:
        for event in events:
            self.run.log({event.name: event.value}, step=event.rows)


def writers(keys: EngineConfig) -> list[Writer]:
    """Those that a configuration asks for. Only the first rank may open them."""
    found: list[Writer] = []
    if keys.csv_monitor.enabled:
        found.append(CsvWriter(keys.csv_monitor))
    if keys.tensorboard.enabled:
        found.append(TensorBoardWriter(keys.tensorboard))
    if keys.wandb.enabled:
        found.append(WandBWriter(keys.wandb))
    return found


def is_installed(package: str) -> bool:
    """Whether a package can be imported. A folder of its name alone, which wandb leaves where it ran, is none."""
    found = find_spec(package)
    return found is not None and found.origin is not None
