"""Fused groups and whole training steps on a GPU, beside PyTorch's own ways: python -m benchmarks.gpu --json gpu.json

Groups (`groups.py`) run forward and backward in bf16; AdamW's step runs over the shards that one of eight ranks holds;
whole steps are those of a Llama of 1B parameters, computed in bf16 with masters in fp32. The systems take turns.

    python -m benchmarks.gpu --device cpu --tiny

tries all of it on a processor with tiny shapes; times mean nothing there.
"""

from __future__ import annotations

import multiprocessing
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import quantiles
from typing import Annotated, Any, TypeVar

import torch
import triton
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

import zgraph
from benchmarks import contenders
from benchmarks.clock import Clock, Taken, compare
from benchmarks.contenders import EAGER, Prepare, made_on
from benchmarks.errors import BenchmarkError, NoGpu, UnknownName
from benchmarks.groups import Group, Shape, groups
from benchmarks.results import environment, write
from zgraph.bridge.target import cost_table
from zgraph.cost import CostTable, work
from zgraph.errors import ZgraphError
from zgraph.ir.symbols import evaluate
from zgraph.passes import Context, parse_recipe

T = TypeVar("T")

FUSED = parse_recipe("canonicalize,fuse,dce")
META = torch.device("meta")
ADAMW_BYTES = 28
"""Bytes that AdamW moves for an fp32 parameter: master, gradient and two moments read, all but the gradient written."""

COLUMNS = ("step ms", "quartiles", "of eager", "of best\nother", "of\nroofline", "host ms", "peak MB", "differs")

TRAINING, TRAINED = "training step", "Llama-3.2 1B"


@dataclass(frozen=True)
class Options:
    """Measurements to make, and how often. No words mean everything."""

    device: str
    is_tiny: bool
    only: tuple[str, ...]
    systems: tuple[str, ...]
    hardware: str | None
    batch: int
    tokens: int
    num_rounds: int
    num_steps: int
    num_warmup: int

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)


@dataclass(frozen=True)
class Thing:
    """A task for all systems: `prepares` gives them for a device, `bound_s` the time that none can be faster than."""

    name: str
    model: str
    prepares: Callable[[torch.device], Mapping[str, Prepare]]
    bound_s: Callable[[CostTable], float]

    @property
    def title(self) -> str:
        return f"{self.name}, {self.model}"


@dataclass(frozen=True)
class Row:
    """One system at one thing; seconds of a step, median and quartiles of all rounds.

    vs_eager, vs_best: median over eager's, and over that of the fastest system that is not zgraph.
    bound_s, of_roofline: the time of the roofline, and its share of the median.
    host_s, peak_bytes, difference, loss: as in `Taken`; of whole steps, the difference is that of the loss.
    """

    thing: str
    model: str
    system: str
    error: str | None = None
    step_s: float | None = None
    step_low_s: float | None = None
    step_high_s: float | None = None
    vs_eager: float | None = None
    vs_best: float | None = None
    bound_s: float | None = None
    of_roofline: float | None = None
    host_s: float | None = None
    peak_bytes: int | None = None
    difference: float | None = None
    loss: float | None = None


def rows(thing: Thing, found: Mapping[str, Taken], bound_s: float | None) -> list[Row]:
    """One row a system, in their order."""
    made = [
        _row(Row(thing.name, thing.model, system, taken.error, bound_s=bound_s), taken)
        for system, taken in found.items()
    ]
    known = [(row.system, row.step_s) for row in made if row.step_s]
    eager = next((s for system, s in known if system in EAGER), None)
    best = min((s for system, s in known if not system.startswith("zgraph")), default=None)
    return [
        replace(row, vs_eager=row.step_s / eager if eager else None, vs_best=row.step_s / best if best else None)
        if row.step_s
        else row
        for row in made
    ]


def _row(row: Row, taken: Taken) -> Row:
    if taken.error is not None or len(taken.seconds) < 2:
        return row
    low, middle, high = quantiles(taken.seconds, n=4, method="inclusive")
    return replace(
        row,
        step_s=middle,
        step_low_s=low,
        step_high_s=high,
        of_roofline=row.bound_s and row.bound_s / middle,
        host_s=taken.host_s,
        peak_bytes=taken.peak_bytes,
        difference=taken.difference,
        loss=taken.loss,
    )


# --- what is measured ------------------------------------------------------------------------------------------------


def things(options: Options) -> list[Thing]:
    """Groups and updates, in the order of the tables, and the whole step."""
    found = [_of_group(group) for group in groups(is_tiny=options.is_tiny)]
    found += [_of_adamw(shape) for shape in contenders.shapes(is_tiny=options.is_tiny)]
    return [*found, _of_training(options)]


def _of_group(group: Group) -> Thing:
    def bound_s(costs: CostTable) -> float:
        with made_on(META, torch.bfloat16):
            return roofline_s(group.module(), group.inputs(), costs)

    return Thing(group.name, group.shape.model, lambda device: contenders.of_group(group, device), bound_s)


def _of_adamw(shape: Shape) -> Thing:
    def bound_s(costs: CostTable) -> float:
        with made_on(META, torch.float32):
            return _update_s(contenders.layers(shape), costs) / contenders.NUM_SHARDS

    return Thing("AdamW over shards", shape.model, lambda device: contenders.of_adamw(shape, device), bound_s)


def _of_training(options: Options) -> Thing:
    """Of `options.batch` sequences."""

    def prepares(device: torch.device) -> Mapping[str, Prepare]:
        return contenders.of_training(options.batch, options.tokens, device, is_tiny=options.is_tiny)

    def bound_s(costs: CostTable) -> float:
        with made_on(META, torch.float32):
            model = contenders.LossOnly(contenders.llama_1b(is_tiny=options.is_tiny))
            ids = torch.zeros(options.batch, options.tokens, dtype=torch.int64)
        return roofline_s(model, (ids,), costs, torch.bfloat16) + _update_s(model, costs)

    return Thing(TRAINING, TRAINED, prepares, bound_s)


def _update_s(model: nn.Module, costs: CostTable) -> float:
    num_bytes = ADAMW_BYTES * sum(p.numel() for p in model.parameters())
    return num_bytes / costs.hardware.device.memory_bytes_per_s


def roofline_s(
    module: nn.Module, inputs: tuple[Tensor, ...], costs: CostTable, param_dtype: torch.dtype | None = None
) -> float:
    """Seconds of a forward and backward in kernels as `fuse` makes them, each as long as its FLOP or its bytes take."""
    torch.compiler.reset()
    graph = FUSED.run(zgraph.trace(module, *inputs, param_dtype=param_dtype), Context(costs=costs))
    device = costs.hardware.device
    done = [work(graph, node) for node in graph.nodes]
    return sum(
        max(evaluate(d.flop, {}) / device.rate(d.dtype), evaluate(d.num_bytes, {}) / device.memory_bytes_per_s)
        for d in done
    )


# --- running ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """The machine that computes, and the costs that rooflines are drawn from."""

    device: str
    versions: Mapping[str, Any]
    costs: CostTable = field(repr=False)


def machine(options: Options) -> Machine:
    """The machine at hand: its profile is the one asked for, that of its GPU's name, or measured now."""
    device = options.torch_device
    versions = {"cuda": torch.version.cuda, "hip": torch.version.hip, "triton": triton.__version__}
    costs = cost_table(options.hardware, device)
    if device.type == "cpu":
        return Machine("processor", versions, costs)
    properties = torch.cuda.get_device_properties(device)
    if options.hardware is None and costs.hardware.name.split("-")[0] not in properties.name.lower():
        costs = CostTable(hardware=zgraph.profile_machine())
    name = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} units"
    return Machine(name, versions, costs)


def measured(index: int, systems: tuple[str, ...], options: Options, num_rounds: int) -> dict[str, Taken]:
    """These systems at the thing of this number, in this process."""
    thing = things(options)[index]
    device = options.torch_device
    torch.compiler.reset()
    prepares = {name: prepare for name, prepare in thing.prepares(device).items() if name in systems}
    clock = Clock(device, is_cold=thing.name != TRAINING)
    return compare(prepares, clock, options.num_warmup, num_rounds, options.num_steps)


def in_turns(index: int, systems: tuple[str, ...], options: Options) -> dict[str, Taken]:
    """Each system alone, round by round: for what fills the device's memory."""
    found = {system: Taken() for system in systems}
    for _ in range(options.num_rounds):
        for system, taken in list(found.items()):
            if taken.error is None:
                more = apart(options, (system,), measured, index, (system,), options, 1)[system]
                found[system] = replace(more, seconds=taken.seconds + more.seconds)
    first = next((taken.loss for taken in found.values() if taken.loss), None)
    return {
        system: replace(taken, difference=abs(taken.loss - first) / first if taken.loss and first else None)
        for system, taken in found.items()
    }


def fitting(index: int, system: str, options: Options) -> Options:
    """The same with a batch that this system has memory for: half of it, as long as it has not."""
    while options.batch > 1:
        error = apart(options, (system,), measured, index, (system,), replace(options, num_steps=2), 1)[system].error
        if error is None or "out of memory" not in error.lower():
            break
        options = replace(options, batch=options.batch // 2)
    return options


def apart(
    options: Options, systems: tuple[str, ...], function: Callable[..., dict[str, Taken]], *args: Any
) -> dict[str, Taken]:
    """The result of a function: on a GPU in a process of its own, so that no error outlives it."""
    try:
        return in_process(options, function, *args)
    except BrokenProcessPool:
        return {system: Taken(error="the process died; the lines above may say why") for system in systems}


def in_process(options: Options, function: Callable[..., T], *args: Any) -> T:
    if options.device == "cpu":
        return function(*args)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def run(options: Options, costs: CostTable) -> Iterator[tuple[Thing, list[Row]]]:
    """Everything that was asked for, one thing after the other."""
    for index, thing in enumerate(things(options)):
        names = tuple(n for n in thing.prepares(options.torch_device) if _is_meant(n, options.systems))
        if not _is_meant(thing.title, options.only) or not names:
            continue
        if thing.name != TRAINING:
            yield (
                thing,
                rows(
                    thing,
                    apart(options, names, measured, index, names, options, options.num_rounds),
                    _bound_s(thing, costs),
                ),
            )
            continue
        fits = fitting(index, names[0], options)
        thing = replace(things(fits)[index], model=f"{TRAINED}, {fits.batch} x {fits.tokens} tokens")
        yield thing, rows(thing, in_turns(index, names, fits), _bound_s(thing, costs))


def _is_meant(name: str, words: tuple[str, ...]) -> bool:
    return not words or any(word.lower() in name.lower() for word in words)


def _bound_s(thing: Thing, costs: CostTable) -> float | None:
    """None where zgraph cannot capture it: its own rows then say why."""
    try:
        return thing.bound_s(costs)
    except ZgraphError:
        return None


# --- the command -----------------------------------------------------------------------------------------------------


def table(title: str, made: list[Row]) -> Table:
    """One line a system; one that failed says why below."""
    found = Table(title=title, title_justify="left")
    found.add_column("system", no_wrap=True)
    for column in COLUMNS:
        found.add_column(column, justify="right")
    for row in made:
        quartiles = f"{_of(row.step_low_s, 1e3, '.3f')} to {_of(row.step_high_s, 1e3, '.3f')}" if row.step_s else "-"
        found.add_row(
            row.system,
            _of(row.step_s, 1e3, ".3f"),
            quartiles,
            _of(row.vs_eager, 1, ".2f"),
            _of(row.vs_best, 1, ".2f"),
            _of(row.of_roofline, 1, ".0%"),
            _of(row.host_s, 1e3, ".2f"),
            _of(row.peak_bytes, 1e-6, ",.0f"),
            _of(row.difference, 1, ".0e"),
            style="bold" if row.system == "zgraph triton" else "",
        )
    found.caption = Text("\n".join(f"{row.system}: {row.error}" for row in made if row.error))
    found.caption_justify = "left"
    return found


def _of(value: float | None, factor: float, form: str) -> str:
    return "-" if value is None else f"{factor * value:{form}}"


def check(options: Options) -> None:
    """Raises NoGpu or UnknownName."""
    if options.device != "cpu" and not torch.cuda.is_available():
        kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}"
        built = "for processors" if not (torch.version.cuda or torch.version.hip) else f"with {kind}"
        raise NoGpu(
            f"torch {torch.__version__}, built {built}, finds no GPU",
            "Run it where there is one, with a torch built for it, or try it with --device cpu --tiny",
        )
    if options.device == "cpu" and not options.is_tiny:
        raise NoGpu("these shapes are too large for a processor", "Add --tiny to try the script, or leave --device out")
    known = things(options)
    names = {system: None for thing in known for system in thing.prepares(options.torch_device)}
    for words, titles in ((options.only, [thing.title for thing in known]), (options.systems, list(names))):
        for word in words:
            if not any(word.lower() in title.lower() for title in titles):
                raise UnknownName(f"nothing is called {word!r}", f"Use part of one of: {'; '.join(titles)}")


def main(
    only: Annotated[list[str] | None, typer.Option(help="Part of a group's name or its model's; may repeat.")] = None,
    systems: Annotated[list[str] | None, typer.Option(help="Part of a system's name; may repeat.")] = None,
    device: Annotated[str, typer.Option(help="cuda, for AMD's GPUs too, or cpu.")] = "cuda",
    is_tiny: Annotated[bool, typer.Option("--tiny", help="Tiny shapes, to try the script.")] = False,
    hardware: Annotated[str | None, typer.Option(help="The profile of the rooflines; that of the GPU's name.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of a whole step, halved until they fit.")] = 8,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each of them.")] = 2048,
    rounds: Annotated[int, typer.Option(min=1, help="Each system runs once a round.")] = 3,
    steps: Annotated[int, typer.Option(min=2, help="Steps in a round.")] = 30,
    warmup: Annotated[int, typer.Option(min=1, help="Steps before the first.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the results to.")] = None,
) -> None:
    """Measure everything, print a table for each thing, and write what is there so far after each."""
    if is_tiny:
        batch, tokens = 2, 16
    options = Options(
        device, is_tiny, tuple(only or ()), tuple(systems or ()), hardware, batch, tokens, rounds, steps, warmup
    )
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        check(options)
        here = in_process(options, machine, options)
    except (BenchmarkError, ZgraphError) as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(1) from error
    profile = here.costs.hardware
    console.print(f"{here.device}; rooflines of the profile {profile.name}", highlight=False)
    if device == "cpu":
        console.print("[bold]Tiny shapes on a processor: these times mean nothing.[/]")
    whole = {
        "environment": {**environment(), **here.versions},
        "device": here.device,
        "hardware": profile.model_dump(),
        "command": shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]]),
        "options": asdict(options),
    }
    found: list[Row] = []
    for thing, made in run(options, here.costs):
        found += made
        console.print(table(thing.title, made))
        write(json_file, **whole, rows=[asdict(row) for row in found])


if __name__ == "__main__":
    typer.run(main)
