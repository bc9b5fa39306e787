"""Habits of training code, eagerly and by zgraph: python -m benchmarks.habits --json habits.json

Each habit is a small function that trains and gives numbers. It is run on eager PyTorch, whose gradients are averaged
over the ranks, and on zgraph, in processes of its own; losses and parameters are compared.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
import traceback
import warnings
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor

from benchmarks.habit import habits
from benchmarks.habit.side import Compiled, Side
from benchmarks.habit.table import Found, Habit
from benchmarks.habits_page import page
from benchmarks.results import environment
from benchmarks.zoo import warm
from zgraph.errors import CaptureError, StateDictError, ZgraphError
from zgraph.runtime.advice import advice

FORK: Any = get_context("fork")
LIMIT_S = 90.0
AS_GRAPH, IN_PIECES, EAGERLY = True, False, "eager"
VERDICTS = {AS_GRAPH: "equal", IN_PIECES: "in pieces", EAGERLY: "gathered"}


@dataclass(frozen=True)
class Outcome:
    """Outcome of a habit on so many ranks.

    verdict: "equal"; "in pieces" and "gathered" are equal too, with `fullgraph=False` and `fullgraph="eager"`;
        "refused" (with one of zgraph's errors), "torch refuses", "wrong", "failed" (with another error), "hangs", or
        "not run": eager PyTorch does not run it either, or the package is not installed.
    difference: the largest of a loss or a parameter, over the largest entry of what it should be.
    where: that has it.
    message: the sentence that it is refused with.
    """

    name: str
    words: str
    group: str
    stage: int
    num_ranks: int
    verdict: str
    difference: float = 0.0
    where: str = ""
    message: str = ""
    seconds: float = 0.0


def tried(habit: Habit, blank: Outcome) -> Outcome:
    """Run a habit both ways in this process."""
    if habit.package and find_spec(habit.package) is None:
        return replace(blank, message=f"{habit.package} is not installed")
    try:
        torch.manual_seed(0)
        expected = habit.run(Side(blank.stage))
    except Exception as error:
        return replace(blank, message=_first_line(error))
    began = time.perf_counter()
    outcome = _compared(habit, blank, expected)
    return replace(outcome, seconds=round(time.perf_counter() - began, 1))


def _compared(habit: Habit, blank: Outcome, expected: Found) -> Outcome:
    """Outcome with zgraph: as one graph, else in pieces, or eagerly where an error says so."""
    ways: list[bool | str] = [AS_GRAPH]
    for way in ways:
        torch._dynamo.reset()
        torch.manual_seed(0)
        try:
            found = habit.run(Compiled(blank.stage, fullgraph=way))
        except ZgraphError as error:
            if isinstance(error, CaptureError) and way is AS_GRAPH:
                ways.append(IN_PIECES)
            elif 'fullgraph="eager"' in str(error) and way != EAGERLY:
                ways.append(EAGERLY)
            outcome = replace(blank, verdict="refused", message=_first_line(error))
            continue
        except Exception as error:
            where = _without_folders("".join(traceback.format_tb(error.__traceback__)[-1:]))
            verdict = "torch refuses" if advice(error) else "failed"
            return replace(blank, verdict=verdict, message=_advised(error), where=where.strip()[:300])
        gap, where = largest_difference(found, expected)
        verdict = VERDICTS[way] if gap <= habit.tolerance else "wrong"
        return replace(blank, verdict=verdict, difference=gap, where=where if gap else "")
    return outcome


def largest_difference(found: Found, expected: Found) -> tuple[float, str]:
    """The largest relative difference, and what has it."""
    if found.keys() != expected.keys():
        return float("inf"), f"only one side has {', '.join(sorted(found.keys() ^ expected.keys()))}"
    return max(((_relative(found[name], expected[name]), name) for name in expected), default=(float("inf"), "nothing"))


def _relative(one: Tensor | float, other: Tensor | float) -> float:
    ours, theirs = torch.as_tensor(one).double(), torch.as_tensor(other).double()
    if ours.shape != theirs.shape:
        return float("inf")
    if torch.equal(ours.nan_to_num(nan=7e77), theirs.nan_to_num(nan=7e77)):
        return 0.0
    gap = float((ours - theirs).abs().max()) / max(float(theirs.abs().max()), 1e-6)
    return gap if gap == gap else float("inf")


def _advised(error: BaseException) -> str:
    """The first line of an error, and what zgraph says to it where nobody catches it."""
    return " ".join([_first_line(error), *filter(None, [advice(error)])])


def _without_folders(text: str) -> str:
    """The text with files named from the package or this repository on."""
    return re.sub(r"[^\s\"']*/site-packages/", "", text).replace(f"{Path(__file__).parents[1]}/", "")


def _first_line(error: BaseException) -> str:
    lines = _without_folders(str(error)).strip().split("\n")
    line = " ".join(map(str.strip, lines[: 1 + isinstance(error, StateDictError)]))
    return f"{type(error).__name__}: {line[:500]}"


def _rank(habit: Habit, blank: Outcome, rank: int, folder: str) -> None:
    """The work of a process: it tries, and writes the outcome."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    if blank.num_ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(blank.num_ranks)}
        dist.init_process_group(
            "gloo", f"file://{folder}/store", rank=rank, world_size=blank.num_ranks, timeout=timedelta(seconds=60)
        )
    outcome = tried(habit, blank)
    partial = Path(folder, f"{rank}.partial")
    partial.write_text(json.dumps(asdict(outcome)))
    partial.rename(Path(folder, f"{rank}.json"))
    time.sleep(0.2 * (blank.num_ranks > 1))  # the others may still read from the store
    os._exit(0)


def apart(habit: Habit, num_ranks: int, stage: int = 3) -> Outcome:
    """Outcome of a habit in processes of its own: the worst of its ranks' outcomes."""
    blank = Outcome(habit.name, habit.words, habit.group, stage, num_ranks, "not run")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [FORK.Process(target=_rank, args=(habit, blank, r, folder)) for r in range(num_ranks)]
        for process in ranks:
            process.start()
        ends = time.monotonic() + LIMIT_S
        for process in ranks:
            process.join(max(0.0, ends - time.monotonic()))
        late = [process for process in ranks if process.is_alive()]
        for process in late:
            process.kill()
            process.join()
        files = [file for rank in range(num_ranks) if (file := Path(folder, f"{rank}.json")).exists()]
        outcomes = [Outcome(**json.loads(file.read_text())) for file in files]
    if late:
        return replace(blank, verdict="hangs", message="; ".join(o.message for o in outcomes))
    if any(outcome.verdict == "refused" for outcome in outcomes):  # and another rank's connection to it is closed
        outcomes = [outcome for outcome in outcomes if "Connection closed by peer" not in outcome.message]
    elif len(outcomes) < num_ranks:
        return replace(blank, verdict="failed", message=f"exit codes {[p.exitcode for p in ranks]}")
    order = ("equal", "in pieces", "gathered", "not run", "refused", "torch refuses", "wrong", "failed")
    return max(outcomes, key=lambda outcome: (order.index(outcome.verdict), outcome.difference))


def main(
    ranks: Annotated[list[int] | None, typer.Option(help="Numbers of ranks; 1 and 2 if not given.")] = None,
    stage: Annotated[int, typer.Option(min=0, max=3, help="ZeRO stage.")] = 3,
    only: Annotated[list[str] | None, typer.Option(help="Name of a habit; may repeat.")] = None,
    group: Annotated[list[str] | None, typer.Option(help="Group of habits; may repeat.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File to write the results to; what it has of others is kept.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="File to write the page of the results to.")] = None,
) -> None:
    """Train in the way of each habit, eagerly and by zgraph, and compare."""
    found = _known(json_file)
    warm()
    for habit in habits():
        if (only and habit.name not in only) or (group and habit.group not in group):
            continue
        for num_ranks in [n for n in habit.ranks if not ranks or n in ranks]:
            outcome = apart(habit, num_ranks, stage)
            found[habit.name, num_ranks, stage] = outcome
            told = f"{outcome.difference:.0e} {outcome.where}" if outcome.difference else outcome.message
            print(
                f"{num_ranks} {habit.name:32} {outcome.verdict:10} {outcome.seconds:4.1f} s  {told[:400]}", flush=True
            )
            if json_file:
                _write(json_file, _listed(found))
    if markdown:
        listed = _listed(found)
        markdown.write_text(page([asdict(o) for o in listed], environment()))


def _listed(found: dict[tuple[str, int, int], Outcome]) -> list[Outcome]:
    return [found[key] for habit in habits() for key in sorted(found) if key[0] == habit.name]


def _known(path: Path | None) -> dict[tuple[str, int, int], Outcome]:
    if path is None or not path.exists():
        return {}
    outcomes = [Outcome(**row) for row in json.loads(path.read_text())["results"]]
    return {(o.name, o.num_ranks, o.stage): o for o in outcomes}


def _write(path: Path, found: list[Outcome]) -> None:
    rows = ",\n  ".join(json.dumps(asdict(o)) for o in found)
    command = "python -m benchmarks.habits --json habits.json"
    head = json.dumps({"environment": environment(), "command": command}, indent=1)[:-2]
    path.write_text(f'{head},\n "results": [\n  {rows}\n ]\n}}\n')


if __name__ == "__main__":
    typer.run(main)
