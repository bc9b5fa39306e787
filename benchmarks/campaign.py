"""Every launch of a benchmark, in an order in which the noise of the machine hits all systems equally."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from benchmarks.errors import BenchmarkError, NotInstalled
from benchmarks.hosts import Host, loopback
from benchmarks.job import Job, Measure
from benchmarks.launch import launch
from benchmarks.results import Record
from benchmarks.systems import System

NUM_MEMORY_WARMUP_STEPS = 2
"""The first step makes the optimizer state and moves DDP's buckets; the third is like all that follow."""


class Order(StrEnum):
    """Interleaved: every system once, then all of them again. Grouped: one system after another."""

    INTERLEAVED = "interleaved"
    GROUPED = "grouped"


@dataclass(frozen=True)
class Campaign:
    """One launch.

    job: the model, the world and the number of steps; its system is filled in for each launch.
    timeout_s: that one launch may take.
    logs: folder to keep the ranks' output in, or None.
    say: takes a line on how it goes.
    """

    job: Job
    systems: Sequence[System]
    num_rounds: int
    order: Order
    timeout_s: float
    logs: Path | None
    say: Callable[[str], None]

    def measure_memory(self) -> list[Record]:
        """Launch each system once, for the bytes live; not those that plan with what they measure on the hosts."""
        records = [Record(system) for system in self.systems if not system.predicts]
        with loopback(self.job.world_size) as hosts:
            for record in records:
                self._attempt(record, Measure.MEMORY, hosts)
        return records

    def measure_steps(self, hosts: Sequence[Host], memory: Sequence[Record]) -> list[Record]:
        """Launch each system `num_rounds` times on these hosts; one that fails is not launched again.

        memory: what `measure_memory` returned, which goes into the new records, or nothing. If there is something,
            the bytes live of systems that predict them are measured here.
        """
        known = {record.system.name: record for record in memory}
        records = [known.get(system.name, Record(system)).without_rounds() for system in self.systems]
        for record in records:
            if memory and record.system.predicts:
                self._attempt(record, Measure.MEMORY, hosts)
        for record in self._ordered(records):
            if Measure.TIME not in record.errors:
                self._attempt(record, Measure.TIME, hosts)
        return records

    def _ordered(self, records: Sequence[Record]) -> Iterator[Record]:
        if self.order is Order.INTERLEAVED:
            return (record for _ in range(self.num_rounds) for record in records)
        return (record for record in records for _ in range(self.num_rounds))

    def _attempt(self, record: Record, measure: Measure, hosts: Sequence[Host]) -> None:
        """Launch once and put what came of it, an error too, into the record."""
        system = record.system
        job = replace(
            self.job,
            system=system.name,
            measure=measure,
            world_size=self.job.world_size if system.is_distributed else 1,
        )
        if measure is Measure.MEMORY:
            job = replace(job, num_warmup=NUM_MEMORY_WARMUP_STEPS)
        try:
            system.require()
            reports = launch(job, hosts, timeout_s=self.timeout_s, logs=self.logs)
        except NotInstalled as error:
            record.errors[measure] = f"{error.reason}: {error.remedy}"
        except BenchmarkError as error:
            record.errors[measure] = error.reason
            self.say(f"{system.name}, {measure}: {error}")
        else:
            if measure is Measure.MEMORY:
                record.memory = reports
                self.say(f"{system.name}, memory: peak {(record.peak_bytes or 0) / 1e6:.1f} MB")
            else:
                record.rounds.append(reports)
                self.say(f"{system.name}, round {len(record.rounds)}: {record.round_medians_s[-1]:.3f} s")
