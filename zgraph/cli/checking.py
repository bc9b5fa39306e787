"""The commands that say whether a run is right: by rules, and by numbers."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zgraph.cli.app import FAILED, AsJson, Load, app, console, max_bytes, print_json, progress, read_whole_run
from zgraph.errors import VerifyError, ZirError

if TYPE_CHECKING:
    from zgraph.debugging.runs import Checked, Options
    from zgraph.runfile.format import RunFile

RunArgument = Annotated[str, typer.Argument(help="A run file, all of whose graphs are checked; - for standard input.")]
MicroSteps = Annotated[int, typer.Option(min=0, help="How many micro-steps run under no_sync at most.")]
MaxMemory = Annotated[str, typer.Option(help="To use at most, such as 8GiB; by default half of what is free.")]
Dtypes = Annotated[bool, typer.Option("--dtypes", help="In the dtypes that the graphs say, too.")]


@app.command(name="check")
def check_run(
    file: Annotated[str, typer.Argument(help="A run file; - for standard input.")],
    every: Annotated[bool, typer.Option("--every", help="Check each graph, not the last one alone.")] = False,
    seed: Annotated[int, typer.Option(help="Of the random inputs.")] = 0,
    micro_steps: MicroSteps = 2,
    dtypes: Dtypes = False,
    tolerance: Annotated[
        float | None, typer.Option(help="How much of its largest number an output may differ, in fp64.")
    ] = None,
    max_memory: Annotated[
        str, typer.Option(help="To use at most, such as 8GiB; by default half of what is free.")
    ] = "",
    load: Load = None,
    as_json: AsJson = False,
) -> None:
    """Run a run's last graph on simulated ranks, in all programs that training makes of it, beside the captured one.

    Numbers are random, and in fp64. The programs are the step, steps that accumulate under no_sync, each where only the
    loss is differentiated, and the step after an update. Exit code 1 if an output differs.

    Example: `zgraph check run.zg --every`
    """
    from zgraph.debugging.runs import Options

    run = read_whole_run(file)
    options = Options(every, seed, micro_steps, dtypes, tolerance, max_bytes(max_memory))
    found = _checked(run, options)
    if as_json:
        print_json(dataclasses.asdict(found))
    else:
        _print(found)
    if found.wrong is not None:
        raise typer.Exit(FAILED)


@app.command(name="verify")
def verify_run(
    file: RunArgument,
    numeric: Annotated[
        bool, typer.Option("--numeric", help="Run the last graph on simulated ranks, too, as zgraph check does.")
    ] = False,
    micro_steps: MicroSteps = 2,
    dtypes: Dtypes = False,
    load: Load = None,
    as_json: AsJson = False,
) -> None:
    """Certify a run: each graph keeps every rule, and computes what the one before it does; the last fits the budget.

    Example: `zgraph verify run.zg`
    """
    from zgraph.certify.certificate import certify
    from zgraph.debugging.runs import Options

    run = read_whole_run(file)
    steps = []
    for name in run.names:
        try:
            steps.append((name.partition("#")[0], run.graph(name)))
        except ZirError as error:
            raise VerifyError(f"the graph after {name}: {error}") from None
    stated = None if run.stated is None else run.stated.memory.peak.total_bytes
    certificate = certify(steps, run.context, stated)
    found = _checked(run, Options(micro_steps=micro_steps, dtypes=dtypes)) if numeric or dtypes else None
    is_fine = found is None or found.wrong is None
    if as_json:
        rules = [c.model_dump() for c in certificate.checked]
        memory = certificate.footprint and certificate.footprint.model_dump()
        said: dict[str, Any] = {"graphs": list(run.names), "fine": is_fine, "certificate": rules, "memory": memory}
        print_json(said if found is None else {**said, "numeric": dataclasses.asdict(found)})
    else:
        for line in certificate.lines:
            console().print(f"  {line}")
        if found is not None:
            _print(found)
        if is_fine:
            console().print(f"{len(run.names)} graphs are fine")
    if not is_fine:
        raise typer.Exit(FAILED)


def _checked(run: RunFile, options: Options) -> Checked:
    from zgraph.debugging.runs import check_run

    with progress() as shown:
        task = shown.add_task("reading the graphs")
        return check_run(run, options, tell=lambda text: shown.update(task, description=text))


def _print(found: Checked) -> None:
    ranks = f"{found.num_ranks} simulated rank{'s' * (found.num_ranks > 1)}"
    if found.wrong is None:
        what = f"the graph after {found.graphs[0]} computes" if len(found.graphs) == 1 else "each graph computes"
        console().print(f"{what} what was captured, on {ranks}, in {len(found.programs)} programs:")
        for name in found.programs:
            console().print(f"  {name}")
        return
    failure = found.wrong.failure
    rows = [("pass", found.wrong.step + (f" (the graph {found.wrong.graph})" if found.wrong.graph else ""))]
    rows += [("program", failure.program), (failure.kind, failure.message), ("ranks", ranks)]
    rows += [("dtypes", "those that the graph says; in fp64 nothing differs")] if found.wrong.dtypes else []
    for title, text in rows:
        console().print(f"{title:<11}{text}", markup=False, highlight=False, soft_wrap=True)
