"""All ranks run the same programs and do the same in the same order, or each of them says where they do not."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

import zgraph
from zgraph.errors import PlanMismatchError

from .mistakes import Caught, assert_caught, make
from .nets import CLASSES, WIDTH, Mlp, built, rows
from .pool import Pool

RANKS = pytest.mark.parametrize("num_ranks", [2, 4])
UNPACKED = "canonicalize,partition,broadcast,all-gather,reduce-scatter,all-reduce,release,dce"


@pytest.fixture(scope="module")
def group() -> Iterator[Pool]:
    """Workers of this file's own, which are started anew after each job that leaves communication out of step."""
    pool = Pool()
    yield pool
    pool.stop()


class Square(nn.Module):
    """Two heads of one shape, one of which each call takes, or both."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)
        self.heads = nn.ModuleList(nn.Linear(WIDTH, CLASSES) for _ in range(2))
        self.taken = (0, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.body(x))
        return sum(F.cross_entropy(self.heads[head](hidden), y) for head in self.taken)


def run_step(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    model(*inputs).backward()


# --- one program -----------------------------------------------------------------------------------------------


def save_run(mesh: DeviceMesh, path: str) -> None:
    model = zgraph.compile(built(Square)(), mesh=mesh, passes=UNPACKED, save=path)
    run_step(model, rows(0))


def replay_own(mesh: DeviceMesh, path: str) -> Caught:
    own = path.replace(".zg", "-swapped.zg") if mesh.get_local_rank() == 1 else path
    model = zgraph.compile(built(Square)(), mesh=mesh, passes=own)
    return make(model, lambda: run_step(model, rows(0)))


def swap_gathers(path: Path) -> None:
    """Write a run beside this one whose last graph gathers the two heads' weights in the other order."""
    swapped = path.with_stem(f"{path.stem}-swapped")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(swapped, "w") as new:
        last = max(n for n in old.namelist() if n.startswith("graphs/"))
        for name in old.namelist():
            data = old.read(name)
            if name == last:
                lines = data.decode().splitlines(keepends=True)
                first, second = [
                    i
                    for i, line in enumerate(lines)
                    if line.startswith("fwd") and "all_gather_start" in line and f"[{CLASSES}, {WIDTH}]" in line
                ]
                moved = lines.pop(second)
                lines.insert(first, moved)
                data = "".join(lines).encode()
            new.writestr(name, data)


@RANKS
def test_another_run_file_on_one_rank(pool: Pool, num_ranks: int, tmp_path: Path) -> None:
    path = tmp_path / "run.zg"
    pool.run(save_run, num_ranks, str(path))
    swap_gathers(path)
    answers = pool.run(replay_own, num_ranks, str(path))
    assert_caught(answers, PlanMismatchError, "program", "rank 0:", "rank 1:", "Remedy")
    shutil.rmtree(tmp_path)


def disable_on_one(mesh: DeviceMesh) -> Caught:
    if mesh.get_local_rank() == 1:
        os.environ["ZGRAPH_DISABLE"] = "bucket"
    model = built(Mlp)()
    try:
        return make(model, lambda: zgraph.compile(model, mesh=mesh))
    finally:
        os.environ.pop("ZGRAPH_DISABLE", None)


@RANKS
def test_a_pass_disabled_on_one_rank(pool: Pool, num_ranks: int) -> None:
    assert_caught(pool.run(disable_on_one, num_ranks), PlanMismatchError, "ZGRAPH_DISABLE=bucket", "rank 1")


def thread_on_one(mesh: DeviceMesh) -> list[int]:
    """How many threads each rank plans with where one has more of them."""
    rank = mesh.get_local_rank()
    torch.set_num_threads(1 + rank % 2)
    model = zgraph.compile(built(Mlp)(), mesh=mesh)
    try:
        if rank % 2:
            with pytest.warns(UserWarning, match="OMP_NUM_THREADS"):
                run_step(model, rows(0))
        else:
            run_step(model, rows(0))
    finally:
        torch.set_num_threads(1)
    return [v for entry in zgraph.report(model).entries for k, v in entry.hints.items() if "thread" in k]


@RANKS
def test_all_plan_with_the_first_ranks_threads(pool: Pool, num_ranks: int) -> None:
    assert pool.run(thread_on_one, num_ranks) == [[1]] * num_ranks


def take_own_heads(mesh: DeviceMesh, *, known: bool) -> Caught:
    """Each rank takes a head of its own, of one shape: a graph that it compiles now, or has run before (`known`)."""
    model = zgraph.compile(built(Square)(), mesh=mesh)
    for head in (0, 1) if known else (0,):
        model.taken = (head,)
        run_step(model, rows(0))
    model.taken = (mesh.get_local_rank() % 2,)
    return make(model, lambda: run_step(model, rows(0)))


def take_compiled_heads(mesh: DeviceMesh) -> Caught:
    return take_own_heads(mesh, known=True)


def take_new_heads(mesh: DeviceMesh) -> Caught:
    return take_own_heads(mesh, known=False)


@RANKS
@pytest.mark.parametrize("job", [take_new_heads, take_compiled_heads])
def test_ranks_that_take_heads_of_their_own(group: Pool, num_ranks: int, job: object) -> None:
    answers = group.run(job, num_ranks, spoils=True)
    assert_caught(answers, PlanMismatchError, "rank")


# --- one order -------------------------------------------------------------------------------------------------


def skip_a_backward(mesh: DeviceMesh, stage: int) -> Caught:
    model = zgraph.compile(built(Mlp)(), mesh=mesh, stage=stage)
    run_step(model, rows(0))

    def train() -> None:
        for number in range(3):
            loss = model(*rows(number))
            if not (number == 1 and mesh.get_local_rank() == 0):
                loss.backward()

    return make(model, train)


def evaluate_once_more(mesh: DeviceMesh, stage: int) -> Caught:
    model = zgraph.compile(built(Mlp)(), mesh=mesh, stage=stage)
    run_step(model, rows(0))
    with torch.no_grad():
        model(*rows(0))

    def train() -> None:
        if mesh.get_local_rank() == 1:
            with torch.no_grad():
                model(*rows(0))
        for number in range(3):
            run_step(model, rows(number))

    return make(model, train)


@RANKS
@pytest.mark.parametrize(
    ("job", "stage", "culprit"), [(skip_a_backward, 3, 0), (skip_a_backward, 1, 0), (evaluate_once_more, 3, 1)]
)
def test_ranks_that_drift_apart(group: Pool, num_ranks: int, job: object, stage: int, culprit: int) -> None:
    answers = group.run(job, num_ranks, stage, spoils=True)
    assert_caught(answers, PlanMismatchError, "drifted apart", f"rank {culprit} is at", "in call")


def run_models_in_turns(mesh: DeviceMesh) -> Caught:
    """Two models, which one rank calls the other way round."""
    models = [zgraph.compile(built(Mlp)(), mesh=mesh) for _ in range(2)]
    for model in models:
        run_step(model, rows(0))
    order = [*reversed(models)] if mesh.get_local_rank() == 1 else models
    return make(models[0], lambda: [run_step(model, rows(0)) for model in order])


@RANKS
def test_models_called_in_another_order(group: Pool, num_ranks: int) -> None:
    answers = group.run(run_models_in_turns, num_ranks, spoils=True)
    assert_caught(answers, PlanMismatchError, "drifted apart", "rank 1 is at")
