"""Records of training: what steps and nodes took, as `zgraph.compile(model, record=FOLDER)` writes them.

    run.zg         the first training graph after every pass, and what it was planned with
    rank-0.json    of each rank: microseconds of each node and transfer, means of the steps that were taken apart
    rank-0.steps   of each rank: microseconds of every other step, a line each

A step goes from the first node of the forward to the last of the backward. Nothing in the files is run as code, and
none names another file.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from zgraph.bridge.private_files import drafted
from zgraph.errors import RecordError, UsageError
from zgraph.ir import num_ranks
from zgraph.runfile.format import RunFile, load_run

RUN = "run.zg"

MAX_BYTES = 64 << 20
"""Of a rank's file: ten million steps, or the nodes of a model of 70 B parameters several times over."""

MAX_LINE = 24
"""Characters of a step's line at most."""

Us = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class RankRecord(BaseModel):
    """Record of one rank: means over the steps that were taken apart.

    Args:
        rank: whose it is.
        num_steps: that were taken apart.
        nodes: microseconds of each node of the compute lane, by name; of a `wait` what computing waited.
        transfers: microseconds of each collective or copy whose begin and end are known, by the name of its start: of
            all collectives on processors, elsewhere of those that computing waited for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: Literal[1] = 1
    rank: int = Field(ge=0)
    num_steps: int = Field(gt=0)
    nodes: Mapping[str, Us] = Field(min_length=1)
    transfers: Mapping[str, Us] = {}


@dataclass(frozen=True)
class Record:
    """Record of a training: what was planned, and what each rank measured.

    Args:
        path: the folder.
        run: the training graph and what it was planned with.
        ranks: of each rank, in order.
        steps_us: of each rank the steps that were not taken apart.
    """

    path: Path
    run: RunFile
    ranks: tuple[RankRecord, ...]
    steps_us: tuple[tuple[float, ...], ...]

    @property
    def step_us(self) -> float:
        """A step's microseconds: the median of each rank's, and of these the mean."""
        return fmean(median(found) for found in self.steps_us)

    @property
    def num_steps(self) -> int:
        """The fewest steps that a rank has."""
        return min(map(len, self.steps_us))

    def quantile_us(self, share: float) -> float:
        """The microseconds that this share of all ranks' steps stay below."""
        found = sorted(us for steps in self.steps_us for us in steps)
        return found[min(int(share * len(found)), len(found) - 1)]

    @property
    def nodes_us(self) -> dict[str, float]:
        """Microseconds of each node: the mean of the ranks."""
        return {name: fmean(values) for name, values in self._by_name("nodes").items()}

    @property
    def transfers_us(self) -> dict[str, float]:
        """Microseconds of transfers: of the ranks the least, as a rank that begins early also waits for the last."""
        return {name: min(values) for name, values in self._by_name("transfers").items()}

    def _by_name(self, of: Literal["nodes", "transfers"]) -> dict[str, list[float]]:
        found: dict[str, list[float]] = defaultdict(list)
        for rank in self.ranks:
            for name, us in getattr(rank, of).items():
                found[name].append(us)
        return found


def begin_record(folder: Path) -> None:
    """Make the folder of a record, or take an empty one.

    Raises:
        UsageError: there is a record in it already, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with drafted(folder / "rank") as stream:  # a folder that nobody can write to is told before anything is changed
            stream.write(b"")
        (folder / "rank").unlink(missing_ok=True)
        found = next((p.name for p in sorted(folder.iterdir()) if p.name == RUN or p.name.startswith("rank-")), None)
    except OSError as error:
        raise UsageError(f'record="{_shown(folder)}" cannot be a folder: {error.strerror}; take another') from None
    if found is not None:
        raise UsageError(f'record="{_shown(folder)}" has a record already ({found[:40]}); take another folder')


def rank_files(folder: Path, rank: int) -> tuple[Path, Path]:
    """Paths of a rank's record, and of its steps."""
    return folder / f"rank-{rank}.json", folder / f"rank-{rank}.steps"


def save_rank(record: RankRecord, folder: Path) -> None:
    """Write a rank's record: as a whole or not at all."""
    with drafted(rank_files(folder, record.rank)[0]) as stream:
        stream.write(record.model_dump_json().encode())


def read_record(path: Path) -> Record:
    """Read what a training has recorded.

    Args:
        path: the folder, or the run file in it.

    Raises:
        RecordError: something is missing or damaged, or of another graph.
        RunFileError: the run file is none.
    """
    folder = path.parent if path.name == RUN else path
    if not (folder / RUN).is_file():
        raise RecordError(
            f'{_shown(folder)} has no {RUN}: train with zgraph.compile(model, record="{_shown(folder)}") first, and '
            "take the folder that it wrote"
        )
    run = load_run(folder / RUN)
    graph = run.graph()
    known = {name for node in graph.nodes for name in (node.name, *(r.name for r in node.results))}
    ranks, steps = [], []
    for rank in range(num_ranks(graph.mesh)):
        paths = rank_files(folder, rank)
        ranks.append(_rank(paths[0], rank))
        steps.append(_steps(paths[1]))
        if strange := next((n for n in (*ranks[-1].nodes, *ranks[-1].transfers) if n not in known), None):
            raise RecordError(f"{_shown(paths[0])} is of another graph than {RUN}, which has no node {strange[:60]!r}")
    return Record(folder, run, tuple(ranks), tuple(steps))


def _rank(path: Path, rank: int) -> RankRecord:
    try:
        found = RankRecord.model_validate_json(_text(path))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))[:60]}: {e['msg']}" for e in error.errors()[:5])
        raise RecordError(f"{_shown(path)} is no record: {problems}; record again, into an empty folder") from None
    if found.rank != rank:
        raise RecordError(f"{_shown(path)} is of rank {found.rank}; record again, into an empty folder")
    return found


def _steps(path: Path) -> tuple[float, ...]:
    """The steps of a file. A last line that was cut off, as where a process was killed, is left out."""
    lines = _text(path).split("\n")[:-1]
    found = []
    for number, line in enumerate(lines, 1):
        try:
            us = float(line) if len(line) <= MAX_LINE else math.nan
        except ValueError:
            us = math.nan
        if not 0 < us < math.inf:
            raise RecordError(f"{_shown(path)}: line {number} is no time: {line[:MAX_LINE]!r}; remove it")
        found.append(us)
    if not found:
        raise RecordError(f"{_shown(path)} has no step yet: train for more than four steps")
    return tuple(found)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            found = stream.read(MAX_BYTES + 1)
        if len(found) > MAX_BYTES:
            raise RecordError(f"{_shown(path)} has more than {MAX_BYTES >> 20} MiB; record again, into an empty folder")
        return found.decode()
    except FileNotFoundError:
        raise RecordError(
            f"{_shown(path)} is missing: each rank writes its own; bring those of all hosts into one folder, after "
            "more than four steps"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"cannot read {_shown(path)}: {error}") from None


def _shown(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 200 else f"{text[:100]}...{text[-60:]}"


__all__ = ["RUN", "RankRecord", "Record", "begin_record", "rank_files", "read_record", "save_rank"]
