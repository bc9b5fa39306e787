"""Kept plans on several ranks: one runs the passes for all, and a rank that lacks a plan is given it."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

import zgraph
from zgraph.compiler import plans
from zgraph.compiler.compiled_model import compiled_model
from zgraph.errors import BudgetError, KeptPlanWarning, PeerError, ZgraphError
from zgraph.passes.partition import Partition

from .pool import Pool


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.last(F.dropout(torch.relu(self.norm(self.first(x))), 0.1, self.training)), y)


Found = tuple[list[float], int, dict[str, int], list[str]]


def train(mesh: DeviceMesh, folder: str, own: str = "", **options: Any) -> Found:
    """Losses and gradients of two steps and an evaluation, runs of passes, plans by source, and warnings.

    Args:
        mesh: the ranks.
        folder: of kept plans, with {rank} in it; "0" for none.
        own: what is different on rank 1.
        options: of `zgraph.compile`.
    """
    rank, ran = mesh.get_rank(), 0
    run = Partition.run

    def counted(*args: Any) -> Any:
        nonlocal ran
        ran += 1
        return run(*args)

    before = os.environ["ZGRAPH_PLANS"]
    os.environ["ZGRAPH_PLANS"] = "0" if own == "off" and rank == 1 else folder.format(rank=rank)
    Partition.run = counted  # type: ignore[method-assign]
    long = plans.MAX_WORD
    try:
        if own == "long":
            plans.MAX_WORD = 10
        torch._dynamo.reset()
        torch.manual_seed(0)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always", KeptPlanWarning)
            model = zgraph.compile(Net(), mesh=mesh, **{"stage": 3, **options})
            if own == "other options" and rank == 1:
                compiled_model(model).plans.options += "\nanother"  # type: ignore[union-attr]
            torch.manual_seed(rank)
            x, y = torch.randn(4, 6), torch.randint(5, (4,))
            found = []
            for _ in range(2):
                loss = model(x, y)
                loss.backward()
                found += [loss.item(), float(nn.utils.clip_grad_norm_(model.parameters(), 1.0))]
                model.zero_grad()
            model.eval()
            with torch.no_grad():
                found.append(model(x, y).item())
    finally:
        os.environ["ZGRAPH_PLANS"], plans.MAX_WORD = before, long
        Partition.run = run  # type: ignore[method-assign]
    words = [str(each.message) for each in seen if issubclass(each.category, KeptPlanWarning)]
    return found, ran, dict(compiled_model(model).plans.counts), words  # type: ignore[union-attr]


def runs(found: list[Found]) -> list[int]:
    return [ran for _, ran, _, _ in found]


def numbers(found: list[Found]) -> list[list[float]]:
    return [each for each, _, _, _ in found]


def test_passes_run_once_in_a_job_and_not_again_in_the_next(pair: Pool, tmp_path: Path) -> None:
    apart = str(tmp_path / "rank{rank}")
    plain = pair.run(train, 2, "0")
    assert runs(plain) == [2, 2]
    cold = pair.run(train, 2, apart)
    assert runs(cold) == [2, 0]
    assert cold[1][2] == {"reused from rank 0": 2}
    warm = pair.run(train, 2, apart)
    assert runs(warm) == [0, 0]
    for rank in range(2):
        shutil.rmtree(tmp_path / f"rank{rank}")
        missing = pair.run(train, 2, apart)
        assert runs(missing) == [0, 0]
        assert missing[rank][2] == {f"reused from rank {1 - rank}": 2}
        assert numbers(missing) == numbers(plain)
    assert numbers(cold) == numbers(warm) == numbers(plain)
    names = [{path.name for path in (tmp_path / f"rank{rank}").rglob("*.plan")} for rank in range(2)]
    assert names[0] == names[1]
    assert len(names[0]) == 2


def test_ranks_that_share_a_folder_write_a_plan_once(pair: Pool, tmp_path: Path) -> None:
    assert runs(pair.run(train, 2, str(tmp_path))) == [2, 0]
    assert runs(pair.run(train, 2, str(tmp_path))) == [0, 0]
    assert len([*tmp_path.rglob("*.plan")]) == 2


def test_a_rank_with_another_key_or_none_runs_the_passes_itself(pair: Pool, tmp_path: Path) -> None:
    plain = pair.run(train, 2, "0")
    for own in ("other options", "off", "long"):
        found = pair.run(train, 2, str(tmp_path / own.replace(" ", "") / "{rank}"), own)
        assert runs(found) == [2, 2], own
        assert numbers(found) == numbers(plain)
        assert [words for *_, words in found] == [[], []]


def damage(mesh: DeviceMesh, folder: str) -> None:
    if mesh.get_rank() == 1:
        for path in Path(folder.format(rank=1)).rglob("*.plan"):
            path.write_bytes(path.read_bytes()[:-40])


def test_a_rank_whose_files_are_damaged_is_given_others(pair: Pool, tmp_path: Path) -> None:
    apart = str(tmp_path / "rank{rank}")
    pair.run(train, 2, apart)
    pair.run(damage, 2, apart)
    found = pair.run(train, 2, apart)
    assert runs(found) == [0, 0]
    assert [len(words) for *_, words in found] == [0, 2]
    assert "is removed: it is not whole" in found[1][3][0]


def lie(mesh: DeviceMesh, folder: str) -> Found:
    """A rank whose plan is of something else, and one that is given it."""
    to_word = plans.Kept.to_word
    plans.Kept.to_word = lambda plan: "not a plan"  # type: ignore[method-assign]
    try:
        return train(mesh, folder)
    finally:
        plans.Kept.to_word = to_word  # type: ignore[method-assign]


def test_a_word_that_is_no_plan_is_not_used(pair: Pool, tmp_path: Path) -> None:
    found = pair.run(lie, 2, str(tmp_path / "{rank}"))
    assert runs(found) == [2, 2]
    assert found[0][3] == []
    (words,) = set(found[1][3])
    assert words == "the plan of rank 0 is not used: RunFileError: it is no word that a rank gives of a plan"


def refused(mesh: DeviceMesh, folder: str) -> str:
    try:
        train(mesh, folder, memory_budget=2000)
    except ZgraphError as error:
        return type(error).__name__
    return ""


def test_a_budget_that_cannot_hold_is_an_error_of_each_rank(pair: Pool, tmp_path: Path) -> None:
    found = pair.run(refused, 2, str(tmp_path / "{rank}"))
    assert set(found) <= {BudgetError.__name__, PeerError.__name__}
    assert BudgetError.__name__ in found


def late(mesh: DeviceMesh, folder: str) -> str:
    """A rank whose passes do not end, and one that waits for them."""
    import time

    run = Partition.run

    def slow(*args: Any) -> Any:
        time.sleep(4)
        return run(*args)

    os.environ["ZGRAPH_TIMEOUT"] = "1"
    try:
        Partition.run = slow  # type: ignore[method-assign]
        train(mesh, folder)
    except PeerError as error:
        return str(error)
    finally:
        Partition.run = run  # type: ignore[method-assign]
        del os.environ["ZGRAPH_TIMEOUT"]
    return ""


def test_a_plan_that_does_not_come_is_an_error_that_names_the_rank(tmp_path: Path) -> None:
    pool = Pool(2)
    try:
        found = pool.run(late, 2, str(tmp_path / "{rank}"))
    finally:
        pool.stop()
    assert "rank 1 has waited for 1 s" in found[1]
    assert "rank 0" in found[1]
    assert found[0]
