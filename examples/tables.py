"""The tables that the demo ends with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table

from examples.training import Run
from zgraph.compiler.report import Report

NUM_ROWS = 8
KINDS = ("all_gather", "all_gather again", "reduce_scatter", "all_reduce")


def losses(ours: Run, ddp: Run) -> Table:
    """The loss of the first rank as it falls, beside DDP's."""
    table = _table(
        "Loss on the first rank",
        f"Largest relative difference over {len(ours.losses[0])} steps on {ranks(len(ours.losses))}: "
        f"{_difference(ours.losses, ddp.losses)}.",
    )
    for heading in ("step", ours.name, "DDP", "difference"):
        table.add_column(heading, justify="right")
    a, b = ours.losses[0], ddp.losses[0]
    for step in _spread(len(a)):
        difference = abs(a[step] - b[step])
        table.add_row(str(step + 1), f"{a[step]:.6f}", f"{b[step]:.6f}", f"{difference:.1e}" if difference else "0")
    return table


def memory(runs: Mapping[int, Run]) -> Table:
    """Bytes of live storages on the first rank for each stage, and the plan's own figure for the peak."""
    table = _table(
        "Memory per rank in MiB, measured from the live storages",
        "At rest are parameters and AdamW's moments. Gradients live from the backward to the optimizer's step. "
        "The peak is computed from the plan: what lies at rest, gathered parameters, activations, gradients.",
    )
    table.add_column("stage")
    for heading in ("parameters", "moments", "at rest", "of stage 0", "gradients", "peak"):
        table.add_column(heading, justify="right")
    for stage, run in sorted(runs.items()):
        held, peak = run.measured, run.measured.rest + _report(run).step_peak_bytes
        sizes = [_mebibytes(size) for size in (held.parameters, held.moments, held.rest, held.gradients, peak)]
        sizes.insert(3, f"{held.rest / runs[0].measured.rest:.2f}")
        table.add_row(str(stage), *sizes)
    return table


def wire(runs: Mapping[int, Run]) -> Table:
    """Bytes that one rank sends in a step for each stage, by collective."""
    table = _table("Sent per rank and step in MiB, by collective", "From the report of each compiled model.")
    table.add_column("stage", vertical="bottom")
    for heading in ("gather", "gather\nagain", "reduce-\nscatter", "all-\nreduce", "in all", "of the\nmodel"):
        table.add_column(heading, justify="right", min_width=8, vertical="bottom")
    for stage, run in sorted(runs.items()):
        report = _report(run)
        sent = _sent(report)
        cells = [_mebibytes(sent[kind]) if kind in sent else "-" for kind in KINDS]
        share = f"{report.sent_bytes / report.whole_bytes:.2f}"
        table.add_row(str(stage), *cells, _mebibytes(report.sent_bytes), share)
    return table


def _sent(report: Report) -> Counter[str]:
    """Bytes by kind of collective in the training graph."""
    entry = next(e for e in report.entries if e.kind == "training")
    sent: Counter[str] = Counter()
    for row in entry.traffic:
        again = " again" if row.op.startswith("all_gather") and row.phase == "bwd" else ""
        sent[row.op.removesuffix("_start") + again] += row.sent_bytes
    return sent


def _report(run: Run) -> Report:
    assert run.report is not None, "DDP has no report"
    return run.report


def _difference(ours: Sequence[Sequence[float]], ddp: Sequence[Sequence[float]]) -> str:
    pairs = [pair for mine, theirs in zip(ours, ddp, strict=True) for pair in zip(mine, theirs, strict=True)]
    largest = max(abs(a - b) / abs(b) for a, b in pairs)
    return f"{largest:.1e}" if largest else "0, equal to the last bit"


def _spread(num_steps: int) -> list[int]:
    """Steps to show: the first, the last, and some between."""
    rows = min(NUM_ROWS, num_steps)
    return [round(row * (num_steps - 1) / max(1, rows - 1)) for row in range(rows)]


def ranks(num_ranks: int) -> str:
    """ "1 rank", "2 ranks"."""
    return f"{num_ranks} rank{'s' * (num_ranks > 1)}"


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f}"


def _table(title: str, caption: str) -> Table:
    return Table(
        title=title,
        caption=caption,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        pad_edge=False,
    )
