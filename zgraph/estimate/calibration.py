"""A profile of the hardware at hand, from what training there has recorded."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from scipy.optimize import least_squares, minimize_scalar

from zgraph.cost import Accuracy, Device, Hardware, Link
from zgraph.cost.hardware import AttentionRate, known, save
from zgraph.cost.intervals import longest_sequence
from zgraph.cost.work import attention_kernel
from zgraph.errors import RecordError, UsageError
from zgraph.estimate.comparison import costs_on, predicted
from zgraph.ir import OPS, Node, num_ranks
from zgraph.runfile.records import Record, read_record
from zgraph.viz import as_text

ONE_RUN = 1.25
"""How much longer or shorter than predicted steps of other models are taken to be at least, where one run alone was
recorded: its own steps, which the constants were fitted to, tell little of others."""

LEAST_RANGE = 4
"""Collectives of sizes that differ less tell nothing of latency and rate apart: both are scaled alike then."""

MOST_LEVEL = 3.0
"""Times as long or as short, at most, as the sum of the nodes says, that computing is taken to be by whole steps."""

STAY = 1e-3
"""Weight of leaving computing as it is, beside that of steps that come out."""

_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,99}")

_MOST = math.log(1e4)
"""Constants are looked for up to so many times, or parts, of what the profile has (its logarithm)."""


@dataclass(frozen=True)
class Change:
    """A constant of a profile, before and after."""

    name: str
    before: float
    after: float
    num_points: int


@dataclass(frozen=True)
class Run:
    """A recorded run, and the step that is predicted of it by the profile before and after, in microseconds."""

    path: Path
    measured_us: float
    before_us: float
    after_us: float


@dataclass(frozen=True)
class Calibration:
    """Result of a calibration. Prints as a table; its fields are the numbers.

    Args:
        hardware: the profile, with its error bars.
        changes: its constants, before and after.
        runs: the steps that it was fitted to.
        residual: the root of the mean square of log(measured / predicted) of nodes, each weighed by its time.
    """

    hardware: Hardware
    changes: tuple[Change, ...]
    runs: tuple[Run, ...]
    residual: float

    def __rich__(self) -> RenderableType:
        table = Table("constant", "before", "after", "from", title=self.hardware.name, title_justify="left")
        for column in table.columns[1:]:
            column.justify = "right"
        for change in self.changes:
            values = (f"{value:.4g}" for value in (change.before, change.after))
            table.add_row(change.name, *values, f"{change.num_points:,} nodes")
        steps = Table("run", "measured", "predicted before", "predicted now", "off by", title="steps")
        for column in steps.columns[1:]:
            column.justify = "right"
        for run in self.runs:
            times = (f"{us / 1e3:,.2f} ms" for us in (run.measured_us, run.before_us, run.after_us))
            steps.add_row(str(run.path), *times, f"{100 * (run.measured_us / run.after_us - 1):+.1f} %")
        error = self.hardware.error
        bars = f"error bars of steps: {error.time_low:.2f} to {error.time_high:.2f} times what is predicted"
        return Group(table, steps, Text(f"nodes are off by {100 * self.residual:.0f} %, weighed by time; {bars}"))

    def __str__(self) -> str:
        return as_text(self, width=110)


def calibrate(
    *folders: str | Path, path: str | Path | None = None, name: str = "", base: Hardware | None = None
) -> Calibration:
    """Fit a profile to what training has recorded, as `zgraph.compile(model, record=FOLDER)` did.

    Rates of matmuls, of attention and of memory, the time of a launch, and the links that the ranks used are fitted to
    the nodes' times, by least squares of logarithms with a soft absolute loss (Huber, "Robust Estimation of a Location
    Parameter", 1964), each node weighed by the time it takes. Then all of computing becomes as much slower or faster as
    makes whole steps come out on average. Error bars are the quantiles of measured over predicted
    steps: of several runs, each by constants that were fitted without it.

    Args:
        folders: of records, all of the same hardware.
        path: where to write the profile, a `.toml` file, if anywhere.
        name: of the profile; by default that of the file.
        base: the profile to begin with; by default the one that the first run was planned with.

    Raises:
        RecordError: a folder is no record, or has too little to fit.
        UsageError: no folder is given, or the name or the path does not do.
    """
    if not folders:
        raise UsageError('zgraph.calibrate takes the folders of records: zgraph.compile(model, record="costs")')
    target = Path(path) if path is not None else None
    name = name or (target.stem if target is not None else "calibrated")
    if not _NAME.fullmatch(name) or name in known():
        raise UsageError(f"the name {name[:40]!r} is a profile's or none: take small letters, digits, dots, hyphens")
    if target is not None and target.suffix != ".toml":
        raise UsageError(f"{target} is to be a profile: give it the ending .toml")
    records = [read_record(Path(folder)) for folder in folders]
    first = base or records[0].run.context.costs.hardware
    fitted, changes, residual = _fitted(records, first)
    ratios = [_ratios(r, _fitted([o for o in records if o is not r] or records, first)[0]) for r in records]
    fitted = fitted.model_copy(update={"name": name, **_described(records, ratios, first)})
    runs = tuple(
        Run(r.path, r.step_us, predicted(r, costs_on(r, first)).step_us, predicted(r, costs_on(r, fitted)).step_us)
        for r in records
    )
    if target is not None:
        save(fitted, target)
    return Calibration(fitted, changes, runs, residual)


def _ratios(record: Record, hardware: Hardware) -> tuple[float, float]:
    """Measured over predicted: the bounds between which four of five steps are."""
    us = predicted(record, costs_on(record, hardware)).step_us
    return record.quantile_us(0.1) / us, record.quantile_us(0.9) / us


def _described(
    records: Sequence[Record], ratios: Sequence[tuple[float, float]], base: Hardware
) -> dict[str, str | Accuracy]:
    """Source and accuracy of a profile."""
    steps, one = sum(r.num_steps for r in records), len(records) == 1
    least = 1 / ONE_RUN if one else 1.0
    longest = max(longest_sequence(r.run.graph(), r.run.context.hints) for r in records)
    accuracy = base.error.model_copy(
        update={
            "time_low": min(least, *(low for low, _ in ratios)),
            "time_high": max(1 / least, *(high for _, high in ratios)),
            "max_ranks": max(num_ranks(r.run.graph().mesh) for r in records),
            "max_sequence": max(longest, 1),
            "source": f"{steps:,} steps of one run that it was fitted to; of other models at least {ONE_RUN} is assumed"
            if one
            else f"{steps:,} steps of {len(records)} runs, each by constants that were fitted without it",
        }
    )
    return {"source": f"zgraph calibrate, from {steps:,} steps, beginning with {base.name}", "accuracy": accuracy}


@dataclass(frozen=True)
class _Point:
    """A node of the compute lane: what it takes by the profile, and what it took."""

    computing_us: float
    moving_us: float
    is_attention: bool
    us: float


def _fitted(records: Sequence[Record], base: Hardware) -> tuple[Hardware, tuple[Change, ...], float]:
    """A profile with the constants that the records say, what changed, and the residual."""
    points = [point for record in records for point in _points(record, base)]
    if not points:
        raise RecordError("the records have no node that computes: record steps of a model with matmuls")
    computing, moving, us = (np.array([getattr(p, key) for p in points]) for key in ("computing_us", "moving_us", "us"))
    attention = np.array([p.is_attention for p in points])
    launch_us = max(base.device.launch_us, 1e-3)
    weight = np.sqrt(us / us.sum())

    def off(x: np.ndarray) -> np.ndarray:
        matmul, own, memory, launch = x
        longest = np.maximum(computing * np.exp(-np.where(attention, own, matmul)), moving * np.exp(-memory))
        return np.asarray(weight * (np.log(us) - np.log(launch_us * np.exp(launch) + longest)))

    found = _least(off, 4)
    residual = float(np.sqrt((off(found) ** 2).sum()))
    matmul, own, memory, launch = (float(np.exp(v)) for v in found)
    device, changes = base.device, []
    num = {
        "matmul": int((~attention & (computing > 0)).sum()),
        "attention": int((attention & (computing > 0)).sum()),
        "memory": int((computing == 0).sum()),
        "launch": len(points),
    }
    update: dict[str, object] = {}
    if num["matmul"]:
        update["matmul_flops"] = {dtype: rate * matmul for dtype, rate in device.matmul_flops.items()}
        changes.append(Change("matmul, f32, FLOP/s", device.rate("f32"), device.rate("f32") * matmul, num["matmul"]))
    if num["attention"]:
        share = own / (matmul if num["matmul"] else 1.0)
        update["attention"] = rates = _attention(records, device, share)
        kernel, rate = next(iter(rates.items()))
        before = device.attention.get(kernel)
        was = before.forward if before is not None else device.sustained
        changes.append(Change(f"{kernel} attention, share", was, rate.forward, num["attention"]))
    if num["memory"]:
        update["memory_bytes_per_s"] = device.memory_bytes_per_s * memory
        changes.append(
            Change("memory, bytes/s", device.memory_bytes_per_s, device.memory_bytes_per_s * memory, num["memory"])
        )
    update["launch_us"] = launch_us * launch
    changes.append(Change("launch, us", device.launch_us, launch_us * launch, num["launch"]))
    hardware = base.model_copy(update={"device": device.model_copy(update=update), "overlap_slowdown": 1.0})
    hardware, of_links = _linked(records, hardware)
    hardware, of_steps = _leveled(records, hardware)
    return hardware, (*changes, *of_links, *of_steps), residual


def _leveled(records: Sequence[Record], hardware: Hardware) -> tuple[Hardware, tuple[Change, ...]]:
    """The profile with all of computing as much slower or faster as makes the steps come out, on average.

    Nodes are timed in steps of their own, one by one, and the fit to them heeds what most take, not the sum. Steps that
    wait for their links say nothing of computing: it stays as it is then.
    """

    def off(level: float) -> float:
        told = _computing(hardware, math.exp(level))
        steps = [predicted(r, costs_on(r, told)).step_us / r.step_us for r in records]
        return float(np.mean(np.log(steps))) ** 2 + STAY * level**2

    most = math.log(MOST_LEVEL)
    found = minimize_scalar(off, bounds=(-most, most), method="bounded", options={"xatol": 1e-4})
    factor = math.exp(float(found.x))
    change = Change("all of computing, times", 1.0, factor, len(records))
    return _computing(hardware, factor), (change,)


def _computing(hardware: Hardware, factor: float) -> Hardware:
    """The hardware, whose computing takes this many times as long."""
    device = hardware.device
    update = {
        "matmul_flops": {dtype: rate / factor for dtype, rate in device.matmul_flops.items()},
        "memory_bytes_per_s": device.memory_bytes_per_s / factor,
        "launch_us": device.launch_us * factor,
    }
    return hardware.model_copy(update={"device": device.model_copy(update=update)})


def _attention(records: Sequence[Record], device: Device, share: float) -> dict[str, AttentionRate]:
    """Rates of attention: of the kernels that ran, that share of what the profile has of them."""
    ran = {k: None for r in records for n in r.run.graph().nodes if (k := attention_kernel(n))}
    own = AttentionRate(forward=device.sustained, backward=device.sustained, half_sequence=0.0)
    found = {kernel: device.attention_rate(kernel) or own for kernel in ran}
    scaled = {
        kernel: rate.model_copy(
            update={"forward": min(rate.forward * share, 1.0), "backward": min(rate.backward * share, 1.0)}
        )
        for kernel, rate in found.items()
    }
    return {**scaled, **{kernel: rate for kernel, rate in device.attention.items() if kernel not in scaled}}


def _points(record: Record, base: Hardware) -> list[_Point]:
    costs, graph, hints = costs_on(record, base), record.run.graph(), record.run.context.hints
    measured = record.nodes_us
    found = []
    for node in graph.nodes:
        us = measured.get(node.name, 0.0)
        if us > 0 and node.op not in ("wait", "release") and _lane(node) == "compute":
            computing_us, moving_us = costs.bounds_us(graph, node, hints)
            if computing_us or moving_us:
                found.append(_Point(computing_us, moving_us, bool(attention_kernel(node)), us))
    return found


def _lane(node: Node) -> str:
    return OPS[node.op].lane if node.op in OPS else "compute"


def _linked(records: Sequence[Record], hardware: Hardware) -> tuple[Hardware, tuple[Change, ...]]:
    """The profile with the links that collectives used, by what they took; as it is where none could be timed."""
    points = [
        (record, node, us)
        for record in records
        for known_us in (record.transfers_us,)
        for node in record.run.graph().nodes
        if _lane(node) == "comm" and (us := known_us.get(node.name, 0.0)) > 0
    ]
    if len(points) < 2:
        return hardware, ()
    sent = [OPS[node.op].wire_bytes(node, record.run.graph().mesh) for record, node, _ in points]
    is_alike = max(sent) < LEAST_RANGE * max(min(sent), 1)
    took = np.array([point[2] for point in points])
    weight = np.sqrt(took / took.sum())
    crosses = any(_crosses(record) for record in records)

    def scaled(x: np.ndarray) -> Hardware:
        rate, latency = float(np.exp(x[0])), float(np.exp(-x[0] if is_alike else x[1]))
        fields = ("between", "within") if crosses else ("within",)
        return hardware.model_copy(update={f: _scaled(getattr(hardware, f), rate, latency) for f in fields})

    def quoted_us(told: Hardware) -> np.ndarray:
        tables = {id(record): costs_on(record, told) for record in records}
        quoted = [
            tables[id(record)].transfer_us(record.run.graph(), node, record.run.context.hints)
            for record, node, _ in points
        ]
        return np.maximum(quoted, 1e-6)

    def off(x: np.ndarray) -> np.ndarray:
        return np.asarray(weight * (np.log(took) - np.log(quoted_us(scaled(x)))))

    x = _least(off, 1 if is_alike else 2)
    level = np.log(took.sum() / quoted_us(scaled(x)).sum())  # the fit heeds what most take: their sum is to come out
    found = scaled(x - level if is_alike else x + np.array([-level, level]))
    changes = []
    for field in ("within", "between"):
        before, after = getattr(hardware, field), getattr(found, field)
        if before != after:
            changes.append(Change(f"{field}, bytes/s", before.bytes_per_s, after.bytes_per_s, len(points)))
            changes.append(Change(f"{field}, latency, us", before.latency_us, after.latency_us, len(points)))
    return found, tuple(changes)


def _crosses(record: Record) -> bool:
    """Whether its ranks are on several hosts."""
    network = record.run.context.costs.network(record.run.graph().mesh)
    return network.num_hosts > 1


def _scaled(link: Link, rate: float, latency: float) -> Link:
    return link.model_copy(
        update={"bytes_per_s": link.bytes_per_s * rate, "latency_us": max(link.latency_us, 1e-3) * latency}
    )


def _least(off: Callable[[np.ndarray], np.ndarray], count: int) -> np.ndarray:
    """The logarithms of factors at which the residuals are least: of squares first, then with outliers tamed."""
    begin, exact = np.zeros(count), {"xtol": 1e-12, "ftol": 1e-12, "gtol": 1e-12, "bounds": (-_MOST, _MOST)}
    squares = least_squares(off, begin, **exact)
    spread = max(1.4826 * float(np.median(np.abs(squares.fun))), 1e-6)
    return np.asarray(least_squares(off, squares.x, loss="soft_l1", f_scale=spread, **exact).x)


__all__ = ["Calibration", "Change", "Run", "calibrate"]
