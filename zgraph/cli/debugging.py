"""The commands that find what is wrong: which pass and which rewrite of it, and the smallest graph that shows it."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from zgraph.cli.app import (
    FAILED,
    AsJson,
    Load,
    app,
    console,
    errors,
    max_bytes,
    one_of,
    print_json,
    progress,
    read_run,
    write_run,
)
from zgraph.errors import UsageError
from zgraph.ir import Axis, DType, Graph, num_ranks, print_graph
from zgraph.passes import Context, Pipeline, parse_recipe
from zgraph.runfile.format import CAPTURED, RunFile, run_file

MAX_LINES = 40

File = Annotated[str, typer.Argument(help="FILE, or FILE@GRAPH to begin there; - for standard input.")]
World = Annotated[int, typer.Option(min=0, help="Ranks to simulate; 0 takes the file's.")]
Seed = Annotated[int, typer.Option(help="Of the random inputs.")]
Dtype = Annotated[str, typer.Option(help="What numbers are taken to be: f64, f32, or own for what the graphs say.")]
MicroSteps = Annotated[int, typer.Option(min=0, help="How many micro-steps run under no_sync at most.")]
Tolerance = Annotated[float | None, typer.Option(help="How much of its largest number an output may differ.")]
MaxMemory = Annotated[str, typer.Option(help="To use at most, such as 8GiB; by default half of what is free.")]


@app.command(name="bisect")
def bisect_run(
    file: File,
    passes: Annotated[str, typer.Option(help="A recipe to run; by default the graphs in the file are searched.")] = "",
    load: Load = None,
    world: World = 0,
    seed: Seed = 0,
    dtype: Dtype = "f64",
    micro_steps: MicroSteps = 2,
    tolerance: Tolerance = None,
    max_memory: MaxMemory = "",
    as_json: AsJson = False,
) -> None:
    """Find the pass, and the single rewrite of it, after which the graph does something else. Exit code 1 if one does.

    Every graph is run on simulated ranks with random inputs, and compared with the first one. With `--world`, the
    recipe is run again for that many ranks.

    Example: `zgraph bisect run.zg --world 1`
    """
    from zgraph.debugging import bisect, reference
    from zgraph.debugging.bisection import Steps, run_steps

    run, first = read_run(file, CAPTURED)
    pipeline = parse_recipe(passes or run.recipe) if passes or world or load else None
    begin, context = run.graph(first), _context(run, world)
    if pipeline is not None:
        with progress() as shown:
            shown.add_task(f"running {len(pipeline.passes)} passes")
            steps = run_steps(begin, pipeline, context)
    else:
        steps = Steps(tuple((step, graph) for step, graph, _ in run.steps[run.position(first) :]))
    with progress() as shown:
        task = shown.add_task("running the first graph")
        known = reference(
            begin,
            num_ranks(context.mesh),
            seed,
            context.hints,
            _dtype(dtype),
            max_bytes(max_memory),
            reduce_dtype=context.reduce_dtype,
        )
        found = bisect(
            known,
            steps,
            tolerance=tolerance,
            micro_steps=micro_steps,
            sources=run.sources,
            tell=lambda text: shown.update(task, description=text),
        )
    if as_json:
        print_json({"culprit": None if found is None else dataclasses.asdict(found)})
    elif found is None:
        console().print(f"nothing is wrong: after {len(steps.graphs) - 1} passes the graph does what it did")
    else:
        rows = [("pass", f"{found.step} ({found.position} of {found.num_steps})")]
        rows += [(found.failure.kind, found.failure.message)]
        if found.rewrite is not None:
            rows += [("rewrite", f"one part of {found.rewrite.num_rewrites:,}:")] if found.rewrite.lines else []
            rows += [("", line) for line in _shortened(found.rewrite.lines)]
            rows += [("source" if at == 0 else "", text) for at, text in enumerate(_shortened(found.rewrite.sources))]
        rows += [("found", f"with {found.num_checks} checks")]
        for title, text in rows:
            console().print(f"{title:<9}{text}", markup=False, highlight=False, soft_wrap=True)
    if found is not None:
        raise typer.Exit(FAILED)


@app.command(name="reduce")
def reduce_run(
    file: File,
    output: Annotated[str, typer.Option("--output", "-o", help="The run file to write.")] = "small.zg",
    passes: Annotated[str, typer.Option(help="The recipe that fails; by default the file's own.")] = "",
    check: Annotated[str, typer.Option(help="A command that fails (exit code not 0), {} for the run file.")] = "",
    load: Load = None,
    world: World = 0,
    seed: Seed = 0,
    dtype: Dtype = "f64",
    micro_steps: MicroSteps = 2,
    tolerance: Tolerance = None,
    max_memory: MaxMemory = "",
    as_json: AsJson = False,
) -> None:
    """Make a graph small on which passes, or a command, fail: what is left fails in the same way.

    Passes fail where they raise an error, make a graph that is not valid, or change its numbers.

    Example: `zgraph reduce run.zg --load wrong.py --passes canonicalize,wrong -o small.zg`
    """
    from zgraph.debugging import Commanded, Passed, reduce
    from zgraph.debugging.reduction import Check

    if check and passes:
        raise UsageError("--check and --passes are two ways to say what fails: give one of them")
    run, name = read_run(file, CAPTURED)
    if not (check or passes or run.recipe):
        raise UsageError("the file has no passes: say what fails: --passes RECIPE, or --check 'COMMAND {}'")
    pipeline = Pipeline(()) if check else parse_recipe(passes or run.recipe)
    graph, context = run.graph(name), _context(run, world)
    judge: Check = (
        Commanded(check, context, run.manifest.provenance)
        if check
        else Passed(
            pipeline,
            context,
            num_ranks(context.mesh),
            seed,
            _dtype(dtype),
            tolerance,
            max_bytes(max_memory),
            micro_steps,
        )
    )
    with progress() as shown:
        task = shown.add_task("running the whole graph")
        small, failure = reduce(graph, judge, tell=lambda text: shown.update(task, description=text))
    steps = _steps(small, pipeline, context)
    write_run(run_file(steps, run.manifest.provenance, context, run.sources), output)
    if output == "-":
        return
    if as_json:
        print_json(
            {
                "failure": dataclasses.asdict(failure),
                "nodes": len(small.nodes),
                "nodes_before": len(graph.nodes),
                "graph": print_graph(small),
            }
        )
        return
    console().print(print_graph(small), markup=False, highlight=False, end="")
    said = f"{len(graph.nodes):,} nodes became {len(small.nodes):,}, which fail so: {failure.message}"
    errors().print(said, markup=False, highlight=False, soft_wrap=True)


def _steps(graph: Graph, pipeline: Pipeline, context: Context) -> list[tuple[str, Graph, float]]:
    """The graph, and what the passes make of it until one fails, as a run file has them."""
    from zgraph.debugging.bisection import run_steps

    return [(step, made, 0.0) for step, made in run_steps(graph, pipeline, context).graphs]


def _context(run: RunFile, world: int) -> Context:
    """Context of the passes, for as many ranks as are wanted."""
    mesh = run.context.mesh if not world else (Axis("shard", world),) if world > 1 else ()
    return dataclasses.replace(run.context, mesh=mesh)


def _dtype(name: str) -> DType | None:
    return None if one_of("--dtype", name, ("f64", "f32", "own")) == "own" else DType(name)


def _shortened(lines: tuple[str, ...]) -> list[str]:
    rest = len(lines) - MAX_LINES
    return list(lines) if rest <= 0 else [*lines[:MAX_LINES], f"... ({rest:,} lines more; --json has all)"]
