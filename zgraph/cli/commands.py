"""The commands that make run files and work on them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from zgraph.cli.app import (
    COMPUTES,
    DTYPES,
    KERNELS,
    AsJson,
    Load,
    app,
    console,
    errors,
    one_of,
    print_json,
    progress,
    read_run,
    write_run,
)
from zgraph.cli.completion import any_of, hardware_names, pass_names, several_passes
from zgraph.errors import UsageError, did_you_mean
from zgraph.ir import Phase, print_graph, verify
from zgraph.ir.lines import node_lines, read_line
from zgraph.ir.op_rows import LANES
from zgraph.passes import RECIPES, Pass, Pipeline, along_model_axes, known_passes, parse_recipe, recipe_for
from zgraph.passes.core.instruments import PassSummary
from zgraph.passes.core.pipeline import print_size
from zgraph.runfile.diff import compare
from zgraph.runfile.format import CAPTURED, Ran, Recording, graph_names

PHASES = tuple(phase.value for phase in Phase)


@app.command()
def trace(
    model: Annotated[str, typer.Argument(help="FILE.py:FUNCTION, or a folder or name as AutoConfig takes it.")],
    output: Annotated[str, typer.Option("--output", "-o", help="The run file to write.")] = "run.zg",
    stage: Annotated[int, typer.Option(min=0, max=3, help="The ZeRO stage.")] = 3,
    hardware: Annotated[
        str, typer.Option(help="What to plan for, such as h100 or 8x8-h100.", autocompletion=hardware_names)
    ] = "h100",
    world: Annotated[int, typer.Option(min=0, help="Ranks; 0 takes all of the hardware.")] = 0,
    batch: Annotated[int | None, typer.Option(min=1, help="Rows of a rank's batch.", show_default="1")] = None,
    seq: Annotated[int | None, typer.Option(min=1, help="Tokens of a row.", show_default="2048")] = None,
    memory_budget: Annotated[str, typer.Option(help="Such as 70GiB; by default the device's, less a margin.")] = "",
    dtype: Annotated[
        str, typer.Option(help="To compute in: bf16, f16, f32, or as torch calls it.", autocompletion=any_of(*DTYPES))
    ] = "bf16",
    kernels: Annotated[
        str,
        typer.Option(
            help="The passes for aten, triton, inductor, or auto, which zgraph.compile takes on GPUs.",
            autocompletion=any_of(*KERNELS),
        ),
    ] = "aten",
    compute: Annotated[
        str, typer.Option(help="What matrices are multiplied in.", autocompletion=any_of(*COMPUTES))
    ] = "",
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Ranks that compute each op together.")] = 1,
    context_parallel: Annotated[int, typer.Option(min=1, help="Ranks that share each sequence.")] = 1,
    expert_parallel: Annotated[int, typer.Option(min=1, help="Ranks that share the experts.")] = 1,
    passes: Annotated[
        str, typer.Option(help="A recipe in the place of the stage's own.", autocompletion=several_passes)
    ] = "",
    load: Load = None,
    as_json: AsJson = False,
) -> None:
    """Capture a model under fake tensors, run a stage's passes on it, and write a run file.

    Example: `zgraph trace llama-70b/config.json --hardware 8x8-h100 -o run.zg`
    """
    from zgraph.bridge.dtypes import as_dtype
    from zgraph.cli.models import subject
    from zgraph.estimate.trace import traced

    param_dtype = as_dtype(dtype, "--dtype")
    chosen = one_of("--compute", compute, COMPUTES) if compute else None
    recipe = passes or recipe_for(one_of("--kernels", kernels, KERNELS), RECIPES[stage], chosen)
    together = {"tensor": tensor_parallel, "context": context_parallel, "expert": expert_parallel}
    if axes := [axis for axis, size in together.items() if size > 1]:
        if chosen or kernels == "triton":
            raise UsageError("where ranks compute together, leave --compute and --kernels triton out")
        recipe = recipe if passes else along_model_axes(recipe, axes)
    pipeline = parse_recipe(recipe)
    with progress() as shown:
        task = shown.add_task(f"reading {model}")
        found = subject(model, batch, seq)
        shown.update(task, description=f"capturing {model} and running {len(pipeline.passes)} passes")
        run = traced(
            found.model,
            found.inputs,
            pipeline,
            hardware=hardware,
            num_ranks=world or None,
            memory_budget=memory_budget or None,
            param_dtype=param_dtype,
            tensor_parallel=tensor_parallel,
            context_parallel=context_parallel,
            expert_parallel=expert_parallel,
        )
        errors().print(f"captured {run.manifest.provenance.captured}", highlight=False)
        shown.update(task, description=f"writing {output}")
        write_run(run, output)
    if output != "-":
        _print_steps(run.steps, as_json)


@app.command(name="passes")
def list_passes(load: Load = None, as_json: AsJson = False) -> None:
    """Every pass with its contract, options and what it does, and the recipe of each stage.

    Example: `zgraph passes --json`
    """
    if as_json:
        print_json(
            {
                "passes": [_described(kind) for kind in known_passes().values()],
                "recipes": {str(s): text for s, text in RECIPES.items()},
            }
        )
        return
    table = Table("pass", "what it does", "numerics", "needs", "gives", "options")
    for row in map(_described, known_passes().values()):
        table.add_row(*(", ".join(cell) if isinstance(cell, list) else cell for cell in list(row.values())[:6]))
    console().print(table)
    for stage, text in RECIPES.items():
        console().print(f"stage {stage}: {text}", highlight=False)


def _described(kind: type[Pass]) -> dict[str, str | list[str]]:
    """Description of a pass: its docstring, options, numerics and contracts."""
    defaults = {f.name: getattr(kind(), f.name) for f in dataclasses.fields(kind)}
    return {
        "name": kind.name,
        "does": (inspect.getdoc(kind) or "").splitlines()[0],
        "numerics": kind.numerics.value,
        "requires": sorted(kind.requires),
        "provides": sorted(kind.provides),
        "options": [f"{n}={print_size(v) if n.endswith('_bytes') else v}" for n, v in defaults.items()],
        "conflicts": sorted(kind.conflicts),
    }


@app.command()
def opt(
    file: Annotated[str, typer.Argument(help="FILE, or FILE@GRAPH to begin there; - for standard input.")],
    passes: Annotated[
        str, typer.Option(help="The recipe to run; by default the file's own.", autocompletion=several_passes)
    ] = "",
    load: Load = None,
    output: Annotated[str, typer.Option("--output", "-o", help="A run file to write with the new graphs.")] = "",
    print_ir_after: Annotated[
        str,
        typer.Option(help="Print the graph after these passes, separated by commas.", autocompletion=several_passes),
    ] = "",
    print_ir_after_all: Annotated[bool, typer.Option(help="Print the graph after every pass.")] = False,
    print_ir_after_change: Annotated[bool, typer.Option(help="Print it after every pass that changed it.")] = False,
    disable_pass: Annotated[
        list[str] | None, typer.Option(help="Leave a pass out; may be given again.", autocompletion=pass_names)
    ] = None,
    stop_after: Annotated[str, typer.Option(help="The last pass to run.", autocompletion=pass_names)] = "",
    timing: Annotated[bool, typer.Option(help="Print what each pass took.")] = False,
    verify_each: Annotated[bool, typer.Option(help="Check every rule of the IR after every pass.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run passes on the graph that was captured, or on any other of the file.

    Example: `zgraph opt run.zg --passes 'canonicalize,partition(stage=2)' --timing`
    """
    run, name = read_run(file, CAPTURED)
    begin = run.graph(name)
    pipeline = parse_recipe(passes or run.recipe)
    chosen = _chosen(pipeline, disable_pass or [], stop_after)
    wanted = {_known(n.strip()) for n in print_ir_after.split(",") if n.strip()}
    recording = Recording(begin, sources=run.sources)
    with progress() as shown:
        shown.add_task(f"running {len(chosen.passes)} passes")
        chosen.run(begin, run.context, [recording])
    before = begin
    for step, graph, _ in recording.steps:
        if verify_each:
            verify(graph)
        if print_ir_after_all or step.partition("(")[0] in wanted or (print_ir_after_change and graph != before):
            console().print(f"# after {step}\n{print_graph(graph)}", markup=False, highlight=False)
        before = graph
    if output:
        write_run(recording.run_file(run.manifest.provenance, run.context), output)
    if output != "-" and (as_json or timing or not (print_ir_after_all or wanted or print_ir_after_change)):
        _print_steps([(CAPTURED, begin, 0.0), *recording.steps], as_json)


def _chosen(pipeline: Pipeline, disabled: list[str], stop_after: str) -> Pipeline:
    left_out = {_known(name) for name in disabled}
    kept = [step for step in pipeline.passes if step.name not in left_out]
    if stop_after:
        names = [step.name for step in kept]
        if _known(stop_after) not in names:
            raise UsageError(f"{stop_after} is not among the passes to run: {', '.join(names)}")
        kept = kept[: len(names) - names[::-1].index(stop_after)]
    found = Pipeline(tuple(kept))
    found.check()
    return found


def _known(name: str) -> str:
    known = known_passes()
    if name not in known:
        hint = did_you_mean(name, known, f"they are {', '.join(known)}")
        raise UsageError(f"there is no pass {name}; {hint}")
    return name


def _print_steps(steps: Sequence[Ran], as_json: bool) -> None:
    """Print the ops that each pass changed, and its time."""
    found, before = dict[str, PassSummary](), steps[0][1]
    for name, (text, graph, seconds) in zip(graph_names(text for text, _, _ in steps), steps, strict=True):
        found[name], before = PassSummary.of(text, before, graph, seconds), graph
    if as_json:
        print_json(
            [
                {"graph": name, "step": s.text, "seconds": s.seconds, "nodes": s.num_nodes, "changed": s.changed}
                for name, s in found.items()
            ]
        )
        return
    table = Table("after", "nodes", "ms", "changed")
    table.columns[1].justify = table.columns[2].justify = "right"
    for name, step in found.items():
        summary = "" if name == CAPTURED else step.summary
        table.add_row(name, f"{step.num_nodes:,}", f"{1e3 * step.seconds:,.0f}", summary)
    console().print(table)


@app.command()
def show(
    file: Annotated[str, typer.Argument(help="FILE, or FILE@GRAPH such as run.zg@bucket; - for standard input.")],
    op: Annotated[str, typer.Option(help="Only ops whose name contains this.")] = "",
    module: Annotated[str, typer.Option(help="Only nodes of modules whose path contains this.")] = "",
    phase: Annotated[str, typer.Option(help="Only fwd, bwd or upd.", autocompletion=any_of(*PHASES))] = "",
    lane: Annotated[
        str, typer.Option(help="Only this lane: compute, comm, d2h or h2d.", autocompletion=any_of(*LANES))
    ] = "",
    load: Load = None,
    as_json: AsJson = False,
) -> None:
    """The graph after a pass, whole or filtered.

    Example: `zgraph show run.zg@all-gather --op wait --phase fwd`
    """
    phase, lane = phase and one_of("--phase", phase, PHASES), lane and one_of("--lane", lane, LANES)
    run, name = read_run(file)
    text = run.texts[run.member(name)]
    lines = node_lines(text).values()
    if not (op or module or phase or lane or as_json):
        console().print(text, markup=False, highlight=False, end="")
        return
    nodes = [
        n
        for n in (read_line(line) for line in lines if op in line and line.startswith(phase))
        if op in n.op and phase in ("", n.phase) and lane in ("", n.lane) and module in n.origin.module
    ]
    if as_json:
        print_json(
            [
                {
                    "name": n.name,
                    "op": n.op,
                    "phase": n.phase,
                    "lane": n.lane,
                    "text": n.text + n.end,
                    "module": n.origin.module,
                    "source": n.origin.place,
                    "made_by": n.origin.made_by,
                }
                for n in nodes
            ]
        )
    elif nodes:
        console().print("\n".join(n.text + n.end for n in nodes), markup=False, highlight=False)
    else:
        errors().print(f"none of {len(lines):,} nodes is one of those")


@app.command()
def diff(
    first: Annotated[str, typer.Argument(help="FILE@GRAPH.")],
    second: Annotated[str, typer.Argument(help="FILE@GRAPH, or @GRAPH of the same file.")],
    stat: Annotated[bool, typer.Option("--stat", help="Only how many nodes of each op.")] = False,
    load: Load = None,
    as_json: AsJson = False,
) -> None:
    """Compare two graphs: added +, removed -, changed ~, moved >.

    Example: `zgraph diff run.zg@partition @bucket --stat`
    """
    run, name = read_run(first)
    other, other_name = (run, second[1:]) if second.startswith("@") else read_run(second)
    found = compare(run.texts[run.member(name)], other.texts[other.member(other_name)])
    if as_json:
        lists = {"added": found.added, "removed": found.removed, "moved": found.moved}
        texts = {kind: [line.text for line in some] for kind, some in lists.items()}
        changed = [{"before": old.text, "after": new.text} for old, new in found.changed]
        print_json({"stat": found.stat} if stat else {"stat": found.stat, **texts, "changed": changed})
        return
    lines = [
        f"{sum(counts.values()):,} {kind}" + (f": {_counted(counts)}" if counts else "")
        for kind, counts in found.stat.items()
    ]
    if not stat:
        lines += [f"[red]- {escape(n.text)}[/]" for n in found.removed]
        lines += [f"[green]+ {escape(n.text)}[/]" for n in found.added]
        for old, new in found.changed:
            lines += [f"[red]~ {escape(old.text)}[/]", f"[green]~ {escape(new.text)}[/]"]
        lines += [f"[yellow]> {escape(n.text)}[/]" for n in found.moved]
    console().print("\n".join(lines), highlight=False)


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {op}" for op, count in counts.items())
