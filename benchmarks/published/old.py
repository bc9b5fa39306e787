"""Steps that others measured and published, beside what the built-in profiles say: python -m benchmarks.published

`data/measured_steps.csv` holds them with their sources. A step is modelled as

    matmuls      FLOP / (rate of the profile x MATMUL_SHARE)                    (recomputation counted)
    elementwise  passes over [tokens, hidden] in 16 bits, a layer, at the profile's memory bandwidth
    optimizer    28 bytes a parameter of the shard
    network      gathers and reductions a layer, by the profile's links (zgraph.cost.Network); what is longer than the
                 computing beside it is exposed, and so is one layer's share at either end

with three constants fitted to all rows at once: MATMUL_SHARE, and the passes of eager and of compiled code. What is
minimised is the mean absolute logarithm of the error, so that one odd row bends the others little.
"""

from __future__ import annotations

import csv
import itertools
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import typer
from rich.console import Console
from rich.table import Table

from zgraph.cost import Hardware, Link, Network, hardware

DATA = Path(__file__).parent / "data" / "measured_steps.csv"
MATMUL_SHARES = tuple(s / 100 for s in range(60, 101, 2))
EAGER_PASSES = tuple(range(60, 601, 20))
COMPILED_PASSES = tuple(range(20, 301, 20))
UNEXPLAINED = 0.25

PROFILES = {"A100": "a100-80", "H100": "h100", "H200": "h200"}
RECOMPUTED = {"full": 1.0, "none": 0.0, "": 0.0, "no": 0.0}
"""Share of the forward that the backward repeats. Selective recomputation repeats half of it by the layer, and little
by the op."""


@dataclass(frozen=True)
class Row:
    """One published step. `step_s` is what was measured."""

    name: str
    system: str
    model: str
    num_layers: int
    hidden: int
    num_parameters: float
    vocabulary: int
    sequence: int
    num_tokens: int
    num_micro_steps: int
    hardware: Hardware
    num_ranks: int
    strategy: str
    recomputed: float
    is_compiled: bool
    is_reduced_whole: bool
    step_s: float


@dataclass(frozen=True)
class Constants:
    """Constants that are fitted."""

    matmul_share: float
    eager_passes: float
    compiled_passes: float


def read() -> list[Row]:
    """The rows of the table."""
    with DATA.open() as file:
        return [_row(cells) for cells in csv.DictReader(file)]


def _row(cells: Mapping[str, str]) -> Row:
    gpu = cells["gpu"].split("-")[0]
    profile = hardware(PROFILES[gpu])
    if cells["internode_per_gpu_gbps"]:
        rate = 0.9 * float(cells["internode_per_gpu_gbps"]) * 1e9 / 8
        profile = profile.model_copy(update={"between": Link(bytes_per_s=rate, latency_us=profile.between.latency_us)})
    if "HBM2e" in cells["gpu"]:
        device = profile.device.model_copy(update={"memory_bytes_per_s": 0.85 * 2.0e12})
        profile = profile.model_copy(update={"device": device})
    num_ranks, each = int(cells["gpus"]), int(cells["gpus_per_node"])
    micro, sequence = int(cells["ga"]), int(cells["seq"])
    num_tokens = sequence * int(cells["mbs"]) * micro
    parameters = float(cells["params"])
    checkpoint = cells["act_ckpt"].split(" ")[0]
    recomputed = RECOMPUTED.get(checkpoint, 0.5 if "layer" in checkpoint else 0.1)
    return Row(
        cells["id"],
        cells["system"],
        cells["model"],
        int(cells["layers"]),
        int(cells["hidden"]),
        parameters,
        int(cells["vocab"] or 0),
        sequence,
        num_tokens,
        micro,
        profile.shaped(math.ceil(num_ranks / each), each),
        num_ranks,
        cells["strategy"],
        recomputed,
        cells["compile"] == "yes",
        "fp32 RS" in cells["precision"],
        _measured_s(cells, num_tokens, parameters, recomputed),
    )


def _measured_s(cells: Mapping[str, str], num_tokens: int, parameters: float, recomputed: float) -> float:
    """The step as published, or from the tokens or the FLOP a second that were."""
    if cells["step_s"]:
        return float(cells["step_s"])
    if cells["tok_s_gpu"]:
        return num_tokens / fmean(map(float, cells["tok_s_gpu"].split("-")))
    flop = (6 + 2 * recomputed) * parameters * num_tokens
    return flop / (float(cells["tflops_gpu_reported"]) * 1e12)


def predict_s(row: Row, constants: Constants) -> float:
    """Seconds that the model gives for a step."""
    device, num_layers = row.hardware.device, row.num_layers
    tokens = row.num_tokens / row.num_micro_steps
    forward_flop = 2 * (row.num_parameters - row.vocabulary * row.hidden) * tokens
    forward_flop += 2 * num_layers * tokens * row.sequence * row.hidden
    passes = constants.compiled_passes if row.is_compiled else constants.eager_passes
    forward_s = forward_flop / (device.rate("bf16") * constants.matmul_share)
    forward_s += passes / 3 * num_layers * tokens * row.hidden * 2 / device.memory_bytes_per_s
    computing = (forward_s, (2 + row.recomputed) * forward_s)
    gather_s, reduce_s = _network_s(row)
    forward_gather, backward_gather = {"3": (1, 1), "2": (1, 0), "0": (0, 0)}[_stage(row)]
    step_s = 0.0
    for _ in range(row.num_micro_steps):
        wires = (forward_gather * gather_s, backward_gather * gather_s + reduce_s)
        step_s += sum(max(c, w) + w / num_layers for c, w in zip(computing, wires, strict=True))
    shard = row.num_parameters / (row.num_ranks if _stage(row) != "0" else 1)
    return step_s + 28 * shard / device.memory_bytes_per_s


def _stage(row: Row) -> str:
    if row.strategy in ("single",) or row.strategy.startswith("DP"):
        return "0"
    return "2" if "ZeRO-2" in row.strategy or "HSDP" in row.strategy else "3"


def _network_s(row: Row) -> tuple[float, float]:
    """Seconds to gather all parameters, and to reduce all gradients, a layer at a time."""
    if row.num_ranks == 1:
        return 0.0, 0.0
    layer_bytes = 2 * row.num_parameters / row.num_layers
    network = Network.of(row.hardware, row.num_ranks)
    width = 2 if row.is_reduced_whole else 1
    inner = network
    reduce_us = 0.0
    if "HSDP" in row.strategy:
        each = row.hardware.devices_per_host
        inner = Network(row.hardware, each, each)
        across = Network(row.hardware, row.num_ranks // each, 1)
        reduce_us = across.quote("all_reduce", layer_bytes / each).us
    kind = "all_reduce" if _stage(row) == "0" else "reduce_scatter"
    reduce_us += inner.quote(kind, width * layer_bytes).us
    return row.num_layers * inner.quote("all_gather", layer_bytes).us / 1e6, row.num_layers * reduce_us / 1e6


def fit(rows: Iterable[Row]) -> Constants:
    """The constants with the least mean absolute logarithm of the error."""
    known = list(rows)

    def error(constants: Constants) -> float:
        return fmean(abs(math.log(predict_s(r, constants) / r.step_s)) for r in known)

    grid = itertools.product(MATMUL_SHARES, EAGER_PASSES, COMPILED_PASSES)
    return min((Constants(*point) for point in grid), key=error)


def main() -> None:
    """Print each published step, what the model gives, and the mean error."""
    rows = read()
    constants = fit(rows)
    table = Table("row", "system", "model", "GPUs", "measured s", "predicted s", "error", title_justify="left")
    errors = []
    for row in rows:
        predicted = predict_s(row, constants)
        errors.append(predicted / row.step_s - 1)
        odd = abs(errors[-1]) > UNEXPLAINED
        table.add_row(
            row.name,
            row.system,
            row.model,
            f"{row.num_ranks} {row.hardware.name}",
            f"{row.step_s:.3f}",
            f"{predicted:.3f}",
            f"{errors[-1]:+.1%}{' not explained' if odd else ''}",
            style="dim" if odd else "",
        )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    explained = [abs(e) for e in errors if abs(e) <= UNEXPLAINED]
    console.print(
        f"matmuls at {constants.matmul_share:.2f} of the profile's rate; passes over memory a layer: "
        f"{constants.eager_passes} eager, {constants.compiled_passes} compiled\n"
        f"mean error {fmean(map(abs, errors)):.1%} over all {len(errors)} rows, {fmean(explained):.1%} over the "
        f"{len(explained)} within {UNEXPLAINED:.0%}"
    )


if __name__ == "__main__":
    typer.run(main)
