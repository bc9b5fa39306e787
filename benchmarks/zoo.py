"""Architectures of transformers, trained eagerly and by zgraph: python -m benchmarks.zoo --json zoo.json

Each is made as small as its configuration allows, and takes two AdamW steps both ways. Losses and all gradients are
compared. What cannot be captured as one graph is tried again in pieces. Every architecture has a process of its own,
forked from one that has imported all there is to import.
"""

from __future__ import annotations

import copy
import json
import os
import re
import resource
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import transformers
import typer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import zgraph
from benchmarks.results import environment
from benchmarks.zoo_inputs import Inputs, loss_of, runnable
from benchmarks.zoo_models import Architecture, architectures, kind_of
from benchmarks.zoo_page import TRAINED, page
from benchmarks.zoo_torch import MODELS, TorchInputs
from zgraph.errors import CaptureError, GraphBreakError, ZgraphError

FORK: Any = get_context("fork")
Batches = Inputs | TorchInputs

STEPS = 2
PATIENCE = 6
"""Times the seconds of a core that an architecture may take, which may pass on a busy machine."""
EAGER_S = 60
"""Seconds of a core that building a model and its eager steps may take; slower ones are skipped."""
TOLERANCE = 1e-5
"""Larger differences may be rounding, which the same in float64 tells."""
TINY = 1e-6
"""Gradients of which no entry is larger are rounding: sums that would be nought. So are differences in float64."""


@dataclass(frozen=True)
class Outcome:
    """Outcome of an architecture.

    verdict: "whole graph", "pieces", "refused", "wrong", "failed" (an error that is none of zgraph's), "timeout", or
        "not built": the shrunk model does not run eagerly, and does not count.
    graphs: how many were captured.
    difference: the largest of a loss or a gradient, over the largest entry of what it should be.
    double_difference: the same in float64, where it is large in float32.
    where: the loss or the gradient that has it.
    message: the first line of the error; of pieces, the error that the whole graph was refused with.
    """

    name: str
    task: str
    model: str
    verdict: str
    num_ranks: int = 1
    graphs: int = 0
    difference: float = 0.0
    where: str = ""
    message: str = ""
    seconds: float = 0.0
    num_parameters: int = 0
    double_difference: float | None = None

    @property
    def is_rounding(self) -> bool:
        """Whether a difference all but vanishes in float64."""
        return self.double_difference is not None and self.double_difference <= TINY


@dataclass(frozen=True)
class Step:
    """The loss of a step and its gradients by the names of the parameters."""

    loss: float
    gradients: dict[str, Tensor]


def eager(model: nn.Module, inputs: Batches, num_ranks: int) -> list[Step]:
    """The steps of the model without a compiler; on several ranks those of DistributedDataParallel."""
    if num_ranks == 1:
        return steps_of(model, model, inputs)
    return steps_of(nn.parallel.DistributedDataParallel(model, find_unused_parameters=True), model, inputs)


def compiled(model: nn.Module, inputs: Batches, *, fullgraph: bool) -> tuple[list[Step], int]:
    """The steps of the model compiled at stage 3, and how many graphs were captured."""
    trained = zgraph.compile(model, stage=3, fullgraph=fullgraph)
    return steps_of(trained, trained, inputs), len(zgraph.report(trained).entries)


def steps_of(called: nn.Module, model: nn.Module, inputs: Batches) -> list[Step]:
    """Two steps: the first is called, the parameters are the model's, the batches are this rank's own."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    optimizer = _optimizer(model)
    steps = []
    for index in range(STEPS):
        loss = _backward(called, inputs, index, rank)
        gradients = {name: _whole(p.grad, p).clone() for name, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        steps.append(Step(loss, gradients))
    return steps


def largest_difference(steps: Sequence[Step], expected: Sequence[Step]) -> tuple[float, str]:
    """The largest relative difference of a loss or a gradient, and which it is; rounding apart."""
    found = [(0.0, "")]
    for index, (one, other) in enumerate(zip(steps, expected, strict=True), 1):
        found.append((_relative(torch.tensor(one.loss), torch.tensor(other.loss)), f"loss of step {index}"))
        for name, gradient in one.gradients.items():
            if _is_large(gradient) or _is_large(other.gradients[name]):
                found.append((_relative(gradient, other.gradients[name]), f"gradient {name} of step {index}"))
    return max(found)


def _is_large(gradient: Tensor) -> bool:
    return gradient.numel() > 0 and not float(gradient.abs().max()) <= TINY


def _relative(one: Tensor, other: Tensor) -> float:
    gap = float((one - other).abs().max()) / max(float(other.abs().max()), TINY)
    return gap if gap == gap else float("inf")


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6)


def _backward(model: nn.Module, inputs: Batches, step: int, rank: int) -> float:
    """The loss of a step's batch of a rank, after its backward."""
    torch.manual_seed(100 + 10 * step + rank)
    loss = loss_of(model(**inputs.batch(100 + 10 * step + rank)))
    loss.backward()
    return float(loss.detach())


def _whole(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    if gradient is None:
        return torch.zeros(parameter.shape, dtype=parameter.dtype)
    whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return whole.detach()


def tried(architecture: Architecture, num_ranks: int, built: Path) -> Outcome:
    """Train an architecture both ways in this process; the file is made when it has run eagerly."""
    blank = Outcome(architecture.name, architecture.task, architecture.model, "not built", num_ranks)
    try:
        model, inputs = runnable(architecture)
        expected = eager(model, inputs, num_ranks)
        if not all(abs(step.loss) < float("inf") for step in expected):
            return replace(blank, message="the loss is not finite")
    except Exception as error:
        return replace(blank, message=_first_line(error))
    built.touch()
    resource.setrlimit(resource.RLIMIT_CPU, resource.getrlimit(resource.RLIMIT_CPU)[1:] * 2)
    began = time.perf_counter()
    blank = replace(blank, num_parameters=sum(p.numel() for p in model.parameters()))
    outcome = _compared(blank, architecture, torch.float32, expected)
    if outcome.difference > TOLERANCE and outcome.verdict in TRAINED:
        torch._dynamo.reset()
        finer = _compared(blank, architecture, torch.float64)
        outcome = replace(outcome, double_difference=finer.difference)
    if outcome.difference > TOLERANCE and not outcome.is_rounding:
        outcome = replace(outcome, verdict="wrong")
    return replace(outcome, seconds=round(time.perf_counter() - began, 1))


def _compared(blank: Outcome, architecture: Architecture, dtype: torch.dtype, expected: Sequence[Step] = ()) -> Outcome:
    """Result of compiling, as one graph or else in pieces, beside the steps that are expected, or eager ones."""
    why = ""
    for fullgraph in (True, False):
        model, inputs = runnable(architecture)
        model, inputs.dtype = model.to(dtype), dtype
        try:
            expected = expected or eager(copy.deepcopy(model), inputs, blank.num_ranks)
            steps, graphs = compiled(model, inputs, fullgraph=fullgraph)
        except (GraphBreakError, CaptureError) as error:
            torch._dynamo.reset()
            why = _first_line(error)
            continue
        except Exception as error:
            verdict = "refused" if isinstance(error, ZgraphError) else "failed"
            return replace(blank, verdict=verdict, message=_first_line(error), where=_place(error))
        gap, where = largest_difference(steps, expected)
        verdict = "whole graph" if fullgraph else "pieces"
        return replace(blank, verdict=verdict, graphs=graphs, difference=gap, where=where, message=why)
    return replace(blank, verdict="refused", message=why)


def _first_line(error: BaseException) -> str:
    line = re.sub(r"[^\s\"']*/site-packages/", "", str(error)).strip().split("\n")[0]
    return f"{type(error).__name__}: {line[:300]}"


def _place(error: BaseException) -> str:
    """The innermost line of zgraph in an error's traceback."""
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if re.search(r"(passes|runtime|codegen|zgraph)/", f.filename)
    ]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


def warm() -> None:
    """Compile a layer, so that what is imported at the first compilation is imported before processes are forked."""
    layer = zgraph.compile(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Softmax(-1)), stage=3)
    layer(torch.ones(2, 4)).sum().backward()
    torch._dynamo.reset()


@dataclass(frozen=True)
class Limits:
    """What a process may take: seconds of a core, and GiB of memory."""

    timeout_s: float = 180.0
    memory_gib: float = 4.0

    def begin(self) -> None:
        """Set them for this process, which gets the time of its eager steps only."""
        resource.setrlimit(resource.RLIMIT_CPU, (min(EAGER_S, int(self.timeout_s)), int(self.timeout_s)))
        resource.setrlimit(resource.RLIMIT_DATA, (int(self.memory_gib * 2**30),) * 2)


def _rank(architecture: Architecture, rank: int, num_ranks: int, folder: str, limits: Limits) -> None:
    """What a process does: it trains, and writes the outcome."""
    limits.begin()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    if num_ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
        dist.init_process_group(
            "gloo", f"file://{folder}/store", rank=rank, world_size=num_ranks, timeout=timedelta(seconds=120)
        )
    outcome = tried(architecture, num_ranks, Path(folder, "built"))
    partial = Path(folder, f"{rank}.partial")
    partial.write_text(json.dumps(asdict(outcome)))
    partial.rename(Path(folder, f"{rank}.json"))
    os._exit(0)


def apart(architecture: Architecture, num_ranks: int, limits: Limits) -> Outcome:
    """What becomes of an architecture in processes of its own: the worst of its ranks' outcomes."""
    blank = Outcome(architecture.name, architecture.task, architecture.model, "failed", num_ranks)
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            FORK.Process(target=_rank, args=(architecture, r, num_ranks, folder, limits)) for r in range(num_ranks)
        ]
        for process in ranks:
            process.start()
        ends = time.monotonic() + PATIENCE * limits.timeout_s
        for process in ranks:
            process.join(max(0.0, ends - time.monotonic()))
        late = [process for process in ranks if process.is_alive()]
        for process in late:
            process.kill()
            process.join()
        if late or any(process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL) for process in ranks):
            built = Path(folder, "built").exists()
            seconds = limits.timeout_s if built else EAGER_S
            message = f"no end within {seconds:.0f} s of a core"
            return replace(blank, verdict="timeout" if built else "not built", message=message)
        files = [Path(folder, f"{rank}.json") for rank in range(num_ranks)]
        if not all(file.exists() for file in files):
            return replace(blank, message=f"the process died, exit codes {[p.exitcode for p in ranks]}")
        outcomes = [Outcome(**json.loads(file.read_text())) for file in files]
    return max(outcomes, key=lambda outcome: (outcome.verdict not in TRAINED, outcome.difference))


def main(
    ranks: Annotated[int, typer.Option(min=1, help="Ranks; with two, a third of what trains on one is tried.")] = 1,
    only: Annotated[list[str] | None, typer.Option(help="Name in transformers' mappings; may repeat.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="Task; may repeat. All if not given.")] = None,
    minutes: Annotated[float, typer.Option(help="Begin no architecture after that.")] = 600.0,
    timeout: Annotated[float, typer.Option(help="Seconds of a core that one may take.")] = 180.0,
    memory: Annotated[float, typer.Option(help="GiB of memory that a process of one may take.")] = 4.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File to write the results to; what it has is kept.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="File to write the page of the results to.")] = None,
) -> None:
    """Train small architectures eagerly and by zgraph, and compare."""
    transformers.logging.set_verbosity_error()
    found = _known(json_file)
    own = [Architecture(name, "torch", name) for name in MODELS]
    entries = architectures()
    chosen = [a for a in (*own, *entries) if (not only or a.name in only) and (not task or a.task in task)]
    if ranks > 1 and not only:
        names = a_third(found)
        chosen = [a for a in chosen if a.name in names]
    ends = time.monotonic() + 60 * minutes
    warm()
    for architecture in chosen:
        if time.monotonic() > ends:
            break
        same = [o for o in found if o.name == architecture.name and o.num_ranks == ranks]
        if same and not only:
            continue
        outcome = apart(architecture, ranks, Limits(timeout, memory))
        found = [o for o in found if o not in same] + [outcome]
        print(f"{outcome.task:22} {outcome.name:28} {_told(outcome)}", flush=True)
        if json_file:
            _write(json_file, found)
    if markdown:
        markdown.write_text(page([asdict(o) for o in found], environment(), len(entries)))


def a_third(found: Sequence[Outcome]) -> set[str]:
    """The quickest third of what trains on one rank, of each kind and verdict; all of torch's own models."""
    kinds: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in found:
        if outcome.num_ranks == 1 and outcome.verdict in TRAINED:
            kind = outcome.task if outcome.task == "torch" else kind_of(outcome.name, outcome.task)
            kinds.setdefault((kind, outcome.verdict), []).append(outcome)
    chosen: set[str] = set()
    for (kind, _), outcomes in kinds.items():
        quickest = sorted(outcomes, key=lambda outcome: outcome.seconds)
        share = len(outcomes) if kind == "torch" else -(-len(outcomes) // 3)
        chosen |= {outcome.name for outcome in quickest[:share]}
    return chosen


def _told(outcome: Outcome) -> str:
    if outcome.verdict in (*TRAINED, "wrong"):
        kind = f"pieces ({outcome.graphs} graphs)" if outcome.verdict == "pieces" else outcome.verdict
        return f"{kind:20} {outcome.difference:.1e}  {outcome.seconds:.1f} s  {outcome.message[:80]}"
    return f"{outcome.verdict}: {outcome.message[:140]} {outcome.where}"


def _known(path: Path | None) -> list[Outcome]:
    if path is None or not path.exists():
        return []
    return [Outcome(**row) for row in json.loads(path.read_text())["results"]]


def _write(path: Path, found: Sequence[Outcome]) -> None:
    command = "python -m benchmarks.zoo --json zoo.json, then with --ranks 2; in parts, by --task and --only"
    rows = ",\n  ".join(json.dumps(asdict(o)) for o in found)
    head = json.dumps({"environment": environment(), "command": command}, indent=1)[:-2]
    path.write_text(f'{head},\n "results": [\n  {rows}\n ]\n}}\n')


if __name__ == "__main__":
    typer.run(main)
