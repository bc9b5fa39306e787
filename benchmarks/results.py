"""From what the ranks reported to the rows of the table, and to JSON."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from os import cpu_count
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

from benchmarks.job import Measure, RankReport
from benchmarks.systems import Role, System

BYTES_PER_PARAMETER = 4
"""Everything is trained in fp32."""

PACKAGES = ("torch", "transformers", "deepspeed", "zgraph")


@dataclass
class Record:
    """All that was measured of one system on one kind of hosts.

    rounds: the reports of each timed launch, one a rank.
    memory: the reports of the launch that counted bytes live.
    errors: why a measure is missing or cut short.
    """

    system: System
    rounds: list[Sequence[RankReport]] = field(default_factory=list)
    memory: Sequence[RankReport] = ()
    errors: dict[Measure, str] = field(default_factory=dict)

    def without_rounds(self) -> Record:
        """The same memory, ready for other hosts."""
        return Record(self.system, memory=self.memory, errors=dict(self.errors))

    def steps_s(self, round_index: int) -> list[float]:
        """Seconds of each step of a round: a step has ended when its slowest rank has."""
        by_rank = (report.step_s for report in self.rounds[round_index])
        return [max(ranks) for ranks in zip(*by_rank, strict=True)]

    @property
    def rest_bytes(self) -> int | None:
        return max((report.rest_bytes or 0 for report in self.memory), default=None)

    @property
    def peak_bytes(self) -> int | None:
        return max((report.peak_bytes or 0 for report in self.memory), default=None)

    @property
    def round_medians_s(self) -> list[float]:
        return [median(self.steps_s(index)) for index in range(len(self.rounds))]


@dataclass(frozen=True)
class Row:
    """One system, as it is printed. What could not be measured is None.

    step_s, step_low_s, step_high_s: median of the rounds' medians, and the quartiles of all steps.
    vs_best_peer, vs_stage_peer: step time over that of the fastest baseline, and of the fastest baseline of the same
        ZeRO stage. Both are medians over rounds, each round compared with itself, so that a slow spell of the
        machine cancels.
    sent_bytes: of one rank in one step, on the wire, headers included.
    sent_ratio, zero_ratio: sent_bytes over the bytes of all parameters, and what ZeRO counts for the stage.
    rest_bytes, peak_bytes: of the rank that holds most.
    final_loss: at the last step, mean over ranks.
    bound_s, vs_bound: the larger of computing alone (plain eager, in the same run) and the bytes sent over the rate
        of the link; and step time over it.
    predicted_s, exposed_s, predicted_exposed_s, gap: as in `Outlook`, means over ranks and rounds; for systems that
        predict. predicted_peak_bytes belongs to peak_bytes: both come from the launch that counted bytes.
    """

    system: str
    role: Role
    stage: int
    error: str | None
    step_s: float | None = None
    step_low_s: float | None = None
    step_high_s: float | None = None
    vs_best_peer: float | None = None
    vs_stage_peer: float | None = None
    sent_bytes: float | None = None
    sent_ratio: float | None = None
    zero_ratio: float | None = None
    rest_bytes: int | None = None
    peak_bytes: int | None = None
    final_loss: float | None = None
    bound_s: float | None = None
    vs_bound: float | None = None
    predicted_s: float | None = None
    exposed_s: float | None = None
    predicted_exposed_s: float | None = None
    gap: float | None = None
    predicted_peak_bytes: int | None = None
    rounds_step_s: tuple[tuple[float, ...], ...] = ()


def rows(records: Sequence[Record], world_size: int, link_bytes_per_s: float | None = None) -> list[Row]:
    """One row a record, in the same order.

    link_bytes_per_s: what the link between hosts carries in each direction; None if nothing limits it.
    """
    baselines = [record for record in records if record.system.role is Role.BASELINE and record.rounds]
    alone = [median(r.round_medians_s) for r in records if r.system.role is Role.COMPUTE and r.rounds]
    found = [_row(record, baselines, world_size) for record in records]
    return [_bounded(row, alone[0] if alone else None, link_bytes_per_s) for row in found]


def _bounded(row: Row, alone_s: float | None, link_bytes_per_s: float | None) -> Row:
    """The row with the time that no system that sends these bytes can beat."""
    if row.step_s is None or alone_s is None or row.role is Role.COMPUTE:
        return row
    wire_s = row.sent_bytes / link_bytes_per_s if row.sent_bytes and link_bytes_per_s else 0.0
    bound_s = max(alone_s, wire_s)
    return replace(row, bound_s=bound_s, vs_bound=row.step_s / bound_s)


def zero_ratio(stage: int, world_size: int) -> float:
    """Bytes a rank sends in one step over the bytes of all parameters, as ZeRO counts them.

    A gather or a reduce-scatter of everything is (N-1)/N. Stages 0 to 2 do two of them (an all-reduce is
    both), stage 3 gathers once more for the backward (Rajbhandari et al. 2020, section 7). A stage 3 that
    keeps some parameters between forward and backward sends less.
    """
    return (3 if stage == 3 else 2) * (world_size - 1) / world_size


def environment() -> dict[str, Any]:
    """The machine and the versions that a result depends on."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "num_cores": cpu_count(),
        **{package: _version(package) for package in PACKAGES},
    }


def write(path: Path | None, **found: Any) -> None:
    """Write what was found as JSON, with the environment; nothing without a path."""
    if path is not None:
        path.write_text(json.dumps({"environment": environment(), **found}, indent=1, default=sorted) + "\n")


def _row(record: Record, baselines: Sequence[Record], world_size: int) -> Row:
    system = record.system
    row = Row(
        system.name,
        system.role,
        system.stage,
        error="; ".join(dict.fromkeys(record.errors.values())) or None,
        rest_bytes=record.rest_bytes,
        peak_bytes=record.peak_bytes,
        predicted_peak_bytes=max((int(r.outlook["peak_bytes"]) for r in record.memory if r.outlook), default=None),
    )
    if not record.rounds:
        return row
    steps = [record.steps_s(index) for index in range(len(record.rounds))]
    low, _, high = _quartiles(step for steps_of_round in steps for step in steps_of_round)
    reports = record.rounds[-1]
    sent = _sent_bytes(record)
    return replace(
        row,
        step_s=median(record.round_medians_s),
        step_low_s=low,
        step_high_s=high,
        vs_best_peer=_ratio(record, baselines),
        vs_stage_peer=_ratio(record, [baseline for baseline in baselines if baseline.system.stage == system.stage]),
        sent_bytes=sent,
        sent_ratio=None if sent is None else sent / (BYTES_PER_PARAMETER * reports[0].num_parameters),
        zero_ratio=zero_ratio(system.stage, world_size) if system.is_distributed else 0.0,
        final_loss=fmean(report.losses[-1] for report in reports),
        predicted_s=_outlook(record, "step_s"),
        exposed_s=_outlook(record, "measured_exposed_s"),
        predicted_exposed_s=_outlook(record, "exposed_s"),
        gap=_outlook(record, "gap"),
        rounds_step_s=tuple(tuple(steps_of_round) for steps_of_round in steps),
    )


def _ratio(record: Record, baselines: Sequence[Record]) -> float | None:
    """Step time over that of the fastest of the baselines, round by round."""
    if not baselines or not record.system.is_distributed:
        return None
    best = min(baselines, key=lambda baseline: median(baseline.round_medians_s))
    # Not strict: one of the two may have failed in a later round.
    pairs = zip(record.round_medians_s, best.round_medians_s, strict=False)
    return median(own / other for own, other in pairs)


def _outlook(record: Record, key: str) -> float | None:
    """Mean over rounds and ranks of what the system predicted, or measured of itself."""
    found = [report.outlook[key] for reports in record.rounds for report in reports if report.outlook is not None]
    return fmean(found) if found else None


def _sent_bytes(record: Record) -> float | None:
    """Bytes a step, mean over ranks, median over rounds."""
    rounds = [
        fmean(report.sent_bytes / len(report.step_s) for report in reports if report.sent_bytes is not None)
        for reports in record.rounds
        if all(report.sent_bytes is not None for report in reports)
    ]
    return median(rounds) if rounds else None


def _quartiles(values: Iterable[float]) -> list[float]:
    known = list(values)
    return quantiles(known, n=4, method="inclusive") if len(known) > 1 else known * 3


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
