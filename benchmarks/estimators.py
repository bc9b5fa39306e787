"""Published steps beside what other estimators say of them: python -m benchmarks.estimators

llm-analysis (`pip install --no-deps llm-analysis fire termcolor`) predicts time and memory, by the share of the peak
rate that it is told; it is told the one that is best for all rows together, which nobody knows before. DeepSpeed's
`estimate_zero*_model_states_mem_needs` and accelerate's `estimate-memory` are for memory, of states alone. zgraph's
figures are those of its profiles, which were fitted to these rows.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any, Literal

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.published.predict import costs_of, predicted
from benchmarks.published.rows import FILES, Row, read
from benchmarks.results import environment

What = Literal["time", "memory"]
Says = Callable[[Row], float | None]

EFFICIENCIES = tuple(np.round(np.arange(0.2, 0.81, 0.02), 2).tolist())
"""Shares of the peak rate that llm-analysis is tried with."""


@dataclass(frozen=True)
class Error:
    """How far an estimator is off: relative errors without their sign."""

    estimator: str
    what: What
    num_rows: int
    mean: float
    median: float


def main(
    json_path: Annotated[Path | None, typer.Option("--json", help="Where to write what was found.")] = None,
) -> None:
    """Compare the estimators on all rows that each can express."""
    rows = [row for path in FILES for row in read(path) if isinstance(row, Row)]
    known = [row for row in rows if row.memory[0]]
    ours = {row.name: predicted(row, costs_of(row)) for row in rows}
    share = min(EFFICIENCIES, key=lambda found: fmean(_off("time", rows, lambda r: _llm_analysis(r, found)[0])))
    found = [
        _error("zgraph", "time", rows, lambda r: ours[r.name].step_s(costs_of(r))),
        _error(f"llm-analysis, {share:.2f} of the peak rate", "time", rows, lambda r: _llm_analysis(r, share)[0]),
        _error("zgraph", "memory", known, lambda r: ours[r.name].peak_bytes),
        _error("llm-analysis", "memory", known, lambda r: _llm_analysis(r, share)[1]),
        _error("DeepSpeed, stages 2 and 3", "memory", known, _deepspeed),
        _error("accelerate estimate-memory", "memory", known, _accelerate),
    ]
    table = Table("estimator", "of", "rows", "mean error", "median")
    for row in found:
        table.add_row(
            row.estimator, row.what, str(row.num_rows), f"{100 * row.mean:.1f} %", f"{100 * row.median:.1f} %"
        )
    Console().print(table)
    if json_path is not None:
        report = {"environment": environment(), "command": "python -m benchmarks.estimators"}
        json_path.write_text(json.dumps({**report, "errors": [asdict(e) for e in found]}, indent=1) + "\n")


def _error(estimator: str, what: What, rows: list[Row], says: Says) -> Error:
    off = list(_off(what, rows, says))
    return Error(estimator, what, len(off), fmean(off), median(off))


def _off(what: What, rows: list[Row], says: Says) -> Iterator[float]:
    for row in rows:
        if (said := says(row)) is not None:
            yield abs(said / (row.memory[0] if what == "memory" else row.measured_s) - 1)


def _llm_analysis(row: Row, share: float) -> tuple[float, float]:
    """Seconds of a step, and bytes at the peak."""
    from llm_analysis import analysis, config  # type: ignore[import-not-found]

    sizes = row.sizes
    gpu = config.get_gpu_config_by_name("a100-sxm-40gb" if "a100" in row.hardware.name else "h100-sxm-80gb")
    gpu = replace(gpu, mem_per_GPU_in_GB=10_000)  # it says no time of what it takes not to fit, which ran
    model = config.ModelConfig(
        name=row.name,
        num_layers=sizes.num_layers,
        n_head=sizes.num_heads,
        hidden_dim=sizes.hidden,
        vocab_size=sizes.vocabulary,
        max_seq_len=row.sequence,
        num_key_value_heads=sizes.num_kv,
        ffn_embed_dim=sizes.inner,
        expansion_ratio=sizes.inner / sizes.hidden,
        model_type="llama" if sizes.is_gated else "gpt2",
    )
    with contextlib.redirect_stdout(io.StringIO()):
        told: dict[str, Any] = analysis.LLMAnalysis(
            model,
            gpu,
            config.get_dtype_config_by_name("w16a16e16"),
            config.ParallelismConfig(dp_size=row.num_ranks),
            flops_efficiency=share,
        ).training(
            batch_size_per_gpu=row.batch,
            gradient_accumulation_steps=row.num_micro,
            seq_len=row.sequence,
            activation_recomputation=analysis.ActivationRecomputation(
                {"none": 0, "ops": 1, "layers": 1, "full": 2}[row.recomputed]
            ),
            ds_zero=analysis.DSZeRO(row.stage),
            flash_attn=row.attention != "math",
            mlp_gated_linear_units=sizes.is_gated,
        )
    return told["latency_per_iter"], _peak(told)


def _peak(told: dict[str, Any]) -> float:
    """Bytes on a GPU at once: states, and activations of the batch."""
    names = ("weight_memory_per_gpu", "gradient_memory_per_gpu", "optimizer_state_memory_per_gpu")
    states = sum(told[name] for name in names)
    return states + told["activation_memory_batch_size_1"] * told["batch_size_per_gpu"]


def _deepspeed(row: Row) -> float | None:
    """Bytes by `estimate_zero2_model_states_mem_needs` and `estimate_zero3_model_states_mem_needs`, without offload."""
    count, ranks = row.num_parameters, row.num_ranks // row.num_copies
    if row.stage == 3:
        return 4.0 * row.sizes.vocabulary * row.sizes.hidden + 18 * count / ranks
    return 4 * count + 16 * count / ranks if row.stage == 2 else None


def _accelerate(row: Row) -> float:
    """Bytes that `accelerate estimate-memory` says training with Adam takes at most, in bf16 beside fp32."""
    from accelerate.commands.estimate import estimate_training_usage

    return float(max(estimate_training_usage(4 * row.num_parameters, "bfloat16").values()))


if __name__ == "__main__":
    typer.run(main)
