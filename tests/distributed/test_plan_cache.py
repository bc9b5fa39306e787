"""Kept plans on several ranks: one captures for all, and a rank that lacks a plan is given it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

import zgraph
from zgraph.compiler.compiled_model import compiled_model
from zgraph.errors import ZgraphError

from .pool import Pool


class Net(nn.Module):
    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 5)
        self.kind = kind

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        out = self.last(F.dropout(torch.relu(self.norm(self.first(x))), 0.1, training=self.training))
        if self.kind == "prints":
            print("called")
        if self.kind == "breaks" and out.sum() > 0:
            out = out + 1
        return {"loss": F.cross_entropy(out, y), "logits": out}


Found = tuple[list[float], tuple[int, int], str]


def train(mesh: DeviceMesh, folder: str, kind: str = "", stage: int = 3) -> Found:
    """Losses and gradients of two steps and an evaluation, the graphs captured and reused, and the report's words."""
    rank = mesh.get_rank()
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = zgraph.compile(Net(kind), mesh=mesh, stage=stage, plan_cache=folder.format(rank=rank) or None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.manual_seed(rank)
    x, y = torch.randn(4, 6), torch.randint(5, (4,))
    found = []
    for _ in range(2):
        loss = model(x, y)["loss"]
        loss.backward()
        found += [loss.item(), float(nn.utils.clip_grad_norm_(model.parameters(), 1.0))]
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        found.append(model(x, y)["loss"].item())
    state = compiled_model(model)
    return found, (state.num_captured, state.num_reused), zgraph.report(model).reuse


def counts(found: list[Found]) -> list[tuple[int, int]]:
    return [count for _, count, _ in found]


def test_one_rank_captures_for_all_and_later_runs_capture_nothing(pair: Pool, tmp_path: Path) -> None:
    apart = str(tmp_path / "rank{rank}")
    uncached = [numbers for numbers, _, _ in pair.run(train, 2, "")]
    cold = pair.run(train, 2, apart)
    assert counts(cold) == [(2, 0), (0, 2)]
    warm = pair.run(train, 2, apart)
    assert counts(warm) == [(0, 2), (0, 2)]
    shutil.rmtree(tmp_path / "rank1")
    missing = pair.run(train, 2, apart)
    assert counts(missing) == [(0, 2), (0, 2)]
    shutil.rmtree(tmp_path / "rank0")
    other = pair.run(train, 2, apart)
    assert counts(other) == [(0, 2), (0, 2)]
    names = [{path.name for path in (tmp_path / f"rank{rank}").rglob("*.zg")} for rank in range(2)]
    assert names[0] == names[1]
    assert len(names[0]) == 2
    for found in (cold, warm, missing, other):
        assert [numbers for numbers, _, _ in found] == uncached


def damage(mesh: DeviceMesh, folder: str) -> None:
    if mesh.get_rank() == 1:
        for path in Path(folder.format(rank=1)).rglob("*.zg"):
            path.write_bytes(path.read_bytes()[:-40])


def test_a_rank_whose_file_is_damaged_is_given_another(pair: Pool, tmp_path: Path) -> None:
    apart = str(tmp_path / "rank{rank}")
    cold = pair.run(train, 2, apart, "", 2)
    pair.run(damage, 2, apart)
    found = pair.run(train, 2, apart, "", 2)
    assert counts(found) == [(0, 2), (0, 2)]
    assert [numbers for numbers, _, _ in found] == [numbers for numbers, _, _ in cold]


def test_ranks_whose_call_cannot_be_reused_capture_together(pair: Pool, tmp_path: Path) -> None:
    found = pair.run(train, 2, str(tmp_path), "prints")
    assert counts(found) == [(2, 0), (2, 0)]
    assert all("it prints, warns or asks" in words for _, _, words in found)


def break_graph(mesh: DeviceMesh, folder: str) -> str:
    try:
        train(mesh, folder, "breaks")
    except ZgraphError as error:
        return type(error).__name__
    return ""


def test_an_error_of_the_capture_is_one_of_all_ranks(pool: Pool, tmp_path: Path) -> None:
    assert set(pool.run(break_graph, 2, str(tmp_path))) <= {"GraphBreakError", "PeerError"}


def differ(mesh: DeviceMesh, folder: str) -> Found:
    """Ranks whose models compute the same by other Python code."""
    if mesh.get_rank() == 1:
        Net.note = "seen on one rank alone"  # type: ignore[attr-defined]
        Net.forward = _other_forward  # type: ignore[method-assign]
    return train(mesh, folder)


def _other_forward(self: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    hidden = F.dropout(torch.relu(self.norm(self.first(x))), 0.1, training=self.training)
    out = self.last(hidden)
    return {"loss": F.cross_entropy(out, y), "logits": out}


def test_ranks_with_other_keys_capture_together(tmp_path: Path) -> None:
    pool = Pool(2)
    try:
        found = pool.run(differ, 2, str(tmp_path))
    finally:
        pool.stop()
    assert counts(found) == [(2, 0), (2, 0)]
    assert "the ranks' calls differ" in found[0][2]
