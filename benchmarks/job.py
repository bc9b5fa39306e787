"""Request of one launch of ranks, and the report of each rank. Both are JSON files in its folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path


class Measure(StrEnum):
    """Times and bytes sent come from one launch, bytes live from another, which the profiler slows."""

    TIME = "time"
    MEMORY = "memory"


@dataclass(frozen=True)
class Job:
    """One system, trained by one fresh set of processes."""

    system: str
    model: str
    measure: Measure
    world_size: int
    num_warmup: int
    num_steps: int
    device: str = "cpu"

    def write(self, folder: Path) -> None:
        _job_file(folder).write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> Job:
        values = json.loads(_job_file(folder).read_text())
        return cls(**{**values, "measure": Measure(values["measure"])})


@dataclass(frozen=True)
class RankReport:
    """Measurements of one rank; what its job did not ask for is None or empty.

    step_s: seconds of each measured step.
    losses: of the same steps, on this rank's own batches.
    sent_bytes: during all measured steps together.
    outlook: what the system had predicted, if it predicts.
    num_batches: of all ranks in a step, where some share one.
    words: what the system tells of itself.
    """

    num_parameters: int
    step_s: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()
    sent_bytes: int | None = None
    rest_bytes: int | None = None
    peak_bytes: int | None = None
    outlook: dict[str, float] | None = None
    num_batches: int | None = None
    words: str = ""

    def write(self, folder: Path, rank: int) -> None:
        _report_file(folder, rank).write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path, rank: int) -> RankReport:
        values = json.loads(_report_file(folder, rank).read_text())
        return cls(**{**values, "step_s": tuple(values["step_s"]), "losses": tuple(values["losses"])})


def _job_file(folder: Path) -> Path:
    return folder / "job.json"


def _report_file(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.json"
