"""The command that plans training on hardware that is not here."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn

from zgraph.cli.app import COMPUTES, DOES_NOT_FIT, DTYPES, KERNELS, AsJson, app, console, one_of, print_json, progress
from zgraph.cli.completion import any_of, hardware_names
from zgraph.cost import Hardware, hardware
from zgraph.errors import UsageError

if TYPE_CHECKING:
    from zgraph.cost import CostTable
    from zgraph.estimate.stage_figures import StagePlan
    from zgraph.estimate.sweep import Combination, Sweep
    from zgraph.estimate.training_plan import TrainingPlan

BATCHES = (1, 2, 4, 8)
"""Batches that `--sweep` tries where none is given."""

SCALES = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
"""Units of `--tokens`, in upper or lower case."""


@app.command()
def plan(
    model: Annotated[
        str, typer.Argument(help="FILE.py:FUNCTION, or a folder or name as AutoConfig takes it.", show_default=False)
    ] = "",
    targets: Annotated[
        list[str] | None,
        typer.Option(
            "--hardware",
            help="What to plan for, such as 8x8-h100; may be given again.",
            show_default="h100",
            autocompletion=hardware_names,
        ),
    ] = None,
    world: Annotated[int, typer.Option(min=0, help="Ranks; 0 takes all of the hardware.")] = 0,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Rows of a rank's batch; may be given again.", show_default="1"),
    ] = None,
    seq: Annotated[int | None, typer.Option(min=1, help="Tokens of a row.", show_default="2048")] = None,
    memory_budget: Annotated[str, typer.Option(help="Such as 70GiB; by default the device's, less a margin.")] = "",
    dtype: Annotated[
        str, typer.Option(help="To compute in: bf16, f16, f32, or as torch calls it.", autocompletion=any_of(*DTYPES))
    ] = "bf16",
    stage: Annotated[
        list[int] | None,
        typer.Option(min=0, max=3, help="A ZeRO stage; may be given again.", show_default="all"),
    ] = None,
    offload: Annotated[
        str, typer.Option(help="What may go to the host: auto, none, or any of activations,optimizer,parameters.")
    ] = "auto",
    kernels: Annotated[
        str,
        typer.Option(
            help="What runs the ops between collectives; by default what zgraph.compile takes on the hardware.",
            autocompletion=any_of(*KERNELS),
        ),
    ] = "",
    compute: Annotated[
        str, typer.Option(help="What matrices are multiplied in.", autocompletion=any_of(*COMPUTES))
    ] = "",
    compress: Annotated[str, typer.Option(help="A codec, as q8; auto, or exact.", show_default="none")] = "",
    compress_parameters: Annotated[str, typer.Option(help="A codec, as q8, or exact.", show_default="none")] = "",
    tensor_parallel: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Ranks that compute each op together; may be given again.", show_default="1"),
    ] = None,
    context_parallel: Annotated[int, typer.Option(min=1, help="Ranks that share each sequence.")] = 1,
    expert_parallel: Annotated[
        int, typer.Option(min=1, help="Ranks that share the experts, each with a batch of its own.")
    ] = 1,
    parallel: Annotated[
        str,
        typer.Option(
            help="auto tries ranks that compute together along each axis, and takes the fastest.",
            autocompletion=any_of("auto"),
        ),
    ] = "",
    sweep: Annotated[
        bool,
        typer.Option(
            "--sweep",
            help="Try half and twice the hosts of one --hardware too, and batches of 1, 2, 4, 8 if none is given.",
        ),
    ] = False,
    tokens: Annotated[
        str, typer.Option(help="To train on in all, as 15T, 300B or 1e12: how long that takes, in GPU-hours too.")
    ] = "",
    check: Annotated[
        str,
        typer.Option(help="In the place of a model: the folder of a recorded training, beside its prediction."),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Predict training of a model on hardware that is not here: memory, time, what fits, and what to choose.

    Several kinds of hardware or batches are compared in one table. The exit code is 3 where nothing fits. `--check`
    says how far a prediction was off, and which ops are to blame, of what `zgraph.compile(model, record=FOLDER)` kept.

    Example: `zgraph plan llama-70b/config.json --hardware 8x8-h100`
    """
    from zgraph.bridge.dtypes import as_dtype

    if check:
        _check(check, model, targets or [], as_json=as_json)
        return
    if not model:
        raise UsageError("zgraph plan takes a model: FILE.py:FUNCTION, or a folder or name as AutoConfig takes it")
    wanted = _count(tokens) if tokens else 0.0
    names = targets or ["h100"]
    tried = _around(names) if sweep and not world else {name: name for name in names}
    options = {
        "num_ranks": world or None,
        "memory_budget": memory_budget or None,
        "stage": stage,
        "offload": _offload(offload),
        "param_dtype": as_dtype(dtype, "--dtype"),
        "kernels": one_of("--kernels", kernels, KERNELS) if kernels else None,
        "compute": one_of("--compute", compute, COMPUTES) if compute else None,
        "compress": _codecs(compress, compress_parameters),
        "context_parallel": context_parallel,
        "expert_parallel": expert_parallel,
        "parallel": one_of("--parallel", parallel, ("auto",)) if parallel else None,
    }
    groups = tensor_parallel or [1]
    found = _combined(model, tried, batch or [], BATCHES if sweep else BATCHES[:1], seq, groups, options)
    is_one = not sweep and len(found.combinations) == 1
    if as_json:
        print_json(_plan_row(found.combinations[0].plan) if is_one else _sweep_rows(found))
    else:
        console().print(found.combinations[0].plan if is_one else found)
        for one in found.combinations if parallel and not is_one else ():
            console().print(f"{one.hardware}, batch {one.batch}: {one.plan.layouts}")
        for one in found.combinations if wanted else ():
            if one.fits:
                console().print(f"{one.hardware}, batch {one.batch}: {one.training(wanted, found.unit)}")
    if found.fastest is None:
        raise typer.Exit(DOES_NOT_FIT)


def _check(folder: str, model: str, targets: Sequence[str], *, as_json: bool) -> None:
    """A recorded training beside its prediction, by the profile that it was planned with, or another."""
    from zgraph.estimate.comparison import compare, costs_on
    from zgraph.runfile.records import read_record

    if model or len(targets) > 1:
        raise UsageError("--check takes no model, and one --hardware at most: it compares what was recorded")
    record = read_record(Path(folder))
    costs = costs_on(record, hardware(targets[0])) if targets else None
    found = compare(record, costs)
    if as_json:
        print_json({**asdict(found), "off": found.off, "is_within": found.is_within})
    else:
        console().print(found)


def _count(text: str) -> float:
    """A number such as `15T`, `300B`, `20M` or `1e12`. Raises UsageError if it is none."""
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in SCALES else (text, "")
    try:
        found = float(number) * SCALES.get(unit, 1.0)
    except ValueError:
        found = 0.0
    if not 0 < found < 1e30:
        raise UsageError(f"--tokens must be a number such as 15T, 300B or 1e12, not {text[:40]!r}")
    return found


def _around(names: Sequence[str]) -> dict[str, str | Hardware]:
    """A single kind of hardware with half and twice its hosts beside it; a measured table is for what it was measured
    on."""
    if len(names) > 1 or names[0].endswith(".json"):
        return {name: name for name in names}
    given = hardware(names[0])
    counts = sorted({max(given.num_hosts // 2, 1), given.num_hosts, 2 * given.num_hosts})
    each = given.devices_per_host
    return {f"{n}x{each}-{given.name}": given.shaped(n, each) for n in counts}


def _codecs(gradients: str, parameters: str) -> str | dict[str, str] | None:
    """Codecs of `--compress` and `--compress-parameters`, as `zgraph.plan` takes it."""
    given = {"gradients": gradients, "parameters": parameters}
    return {name: codec for name, codec in given.items() if codec} if parameters else gradients or None


def _offload(text: str) -> str | tuple[str, ...] | None:
    if text in ("auto", "none"):
        return "auto" if text == "auto" else None
    return tuple(name.strip() for name in text.split(","))


def _combined(
    model: str,
    targets: Mapping[str, str | Hardware],
    asked: Sequence[int],
    usual: Sequence[int],
    seq: int | None,
    groups: Sequence[int],
    options: Mapping[str, Any],
) -> Sweep:
    """All combinations; the model is captured once for each batch that is asked for, or for the usual ones."""
    import torch

    from zgraph.bridge.aten import FROM_TORCH
    from zgraph.bridge.target import cost_table
    from zgraph.cli.models import subject, training_inputs
    from zgraph.estimate.sweep import Combination, Sweep
    from zgraph.estimate.workers import side_by_side

    tables = {name: cost_table(target, torch.device("cpu")) for name, target in targets.items()}
    peaks = {name: table.hardware.device.peak_flops for name, table in tables.items()}
    dtype = FROM_TORCH[options["param_dtype"]].value
    given = subject(model, asked[0] if asked else None, seq)
    batches = usual[:1] if given.has_own_inputs else asked or usual
    inputs = {b: given.inputs if given.has_own_inputs else training_inputs(given.model, b, seq) for b in batches}
    is_table = len(batches) * len(groups) * len(tables) > 1  # which shows the best stage of each alone
    parts = [(b, group, names) for b in batches for group in groups for names in _parts([*tables], len(batches))]

    def task(batch: int, group: int, names: Sequence[str]) -> tuple[TrainingPlan, ...]:
        chosen = {**options, "tensor_parallel": group}
        return _plans(given.model, [tables[name] for name in names], chosen, inputs[batch], best_only=is_table)

    found: list[Combination] = []
    tasks = [partial(task, *part) for part in parts]
    with side_by_side(tasks) as results, progress(BarColumn(), MofNCompleteColumn()) as shown:
        of_all = shown.add_task(f"planning {model}", total=len(parts))
        for (batch, _, names), plans in zip(parts, results, strict=True):
            rows, items = _counted(inputs[batch])
            found += [
                Combination(name, rows, items, peaks[name].get(dtype) or peaks[name]["f32"], plan)
                for name, plan in zip(names, plans, strict=True)
            ]
            shown.advance(of_all)
    found.sort(key=lambda c: list(targets).index(c.hardware))
    return Sweep(tuple(found), "tokens" if "input_ids" in inputs[batches[0]] else "rows")


def _parts(names: Sequence[str], num_batches: int) -> list[Sequence[str]]:
    """Kinds of hardware in as many parts as keep all processors busy: each batch is captured once for each part."""
    count = min(-(-len(os.sched_getaffinity(0)) // num_batches), len(names))
    return [names[i * len(names) // count : (i + 1) * len(names) // count] for i in range(count)]


def _plans(
    model: Any,
    targets: Sequence[CostTable],
    options: Mapping[str, Any],
    inputs: Mapping[str, Any],
    *,
    best_only: bool,
) -> tuple[TrainingPlan, ...]:
    """A plan for each kind of hardware: with the layout that is asked for, or the best of all."""
    from zgraph.estimate.plan import plan, sweep

    options = {**options}
    if options.pop("parallel") is None:
        return sweep(model, hardware=tuple(targets), best_only=best_only, **options, **inputs)
    return tuple(plan(model, hardware=target, parallel="auto", **options, **inputs) for target in targets)


def _counted(inputs: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and tokens of a rank's batch; rows both times where the model reads no tokens."""
    shapes = [tuple(given.shape) for given in (inputs.get("input_ids"), *inputs.values()) if hasattr(given, "shape")]
    rows = next((shape[0] for shape in shapes if shape), 1)
    return rows, inputs["input_ids"].numel() if "input_ids" in inputs else rows


def _stage_row(stage: StagePlan) -> dict[str, Any]:
    return {**asdict(stage), "whole": sorted(stage.whole), "total_bytes": stage.total_bytes, "total_us": stage.total_us}


def _plan_row(plan: TrainingPlan) -> dict[str, Any]:
    best = plan.stages.index(plan.best) if plan.best is not None else None
    rest = {"placements": dict(plan.placements), "best": best, "reason": plan.reason}
    return {**asdict(plan), "stages": [*map(_stage_row, plan.stages)], **rest}


def _sweep_rows(found: Sweep) -> dict[str, Any]:
    def position(of: Combination | None) -> int | None:
        return None if of is None else found.combinations.index(of)

    return {
        "unit": found.unit,
        "combinations": [*_combination_rows(found)],
        "fastest": position(found.fastest),
        "smallest": position(found.smallest),
        "reason": found.reason,
    }


def _combination_rows(found: Sweep) -> Iterator[dict[str, Any]]:
    for c in found.combinations:
        yield {
            "hardware": c.hardware,
            "num_ranks": c.plan.num_ranks,
            "tensor_parallel": c.plan.tensor_parallel,
            "context_parallel": c.plan.context_parallel,
            "expert_parallel": c.plan.expert_parallel,
            "batch": c.batch,
            "fits": c.fits,
            "items_per_s": c.items_per_s,
            "utilisation": c.utilisation,
            "budget_bytes": c.plan.budget_bytes,
            "stage": _stage_row(c.stage),
        }
