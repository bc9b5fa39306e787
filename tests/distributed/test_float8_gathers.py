"""Weights gathered in float8 on real ranks: the numbers are those of gathering in full, and fewer bytes are sent."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

import zgraph
from tests.deep import deep
from zgraph.passes import RECIPES
from zgraph.passes.core.recipes import recipe_for

from .pool import Pool

GATHERS = "float8-gathers,"


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 48, bias=False), nn.SiLU(), nn.Linear(48, 16))


def trained(mesh: DeviceMesh, stage: int, in_float8: bool, options: dict[str, Any]) -> tuple[list[float], int, int]:
    """Losses of some steps of two micro-steps; bytes that a step sends; and how many gathers are in float8."""
    torch.compiler.reset()
    recipe = recipe_for("aten", RECIPES[stage], "float8")
    assert GATHERS in recipe
    passes = recipe if in_float8 else recipe.replace(GATHERS, "")
    model = zgraph.compile(net(), mesh=mesh, stage=stage, passes=passes, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(4):
        for micro in range(2):
            drawn = torch.Generator().manual_seed(100 * step + 10 * micro + mesh.get_rank())
            x = torch.randn(16, 32, generator=drawn)
            with nullcontext() if micro else zgraph.no_sync(model):
                loss = model(x).float().square().mean()
                loss.backward()
            losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    report = zgraph.report(model)
    nodes = report.entries[0].plan.graph.nodes
    moved = sum(v.tensor.dtype.value == "f8e4m3" for n in nodes if n.op == "all_gather_start" for v in n.operands)
    return losses, report.sent_bytes, moved


@pytest.mark.parametrize(
    ("stage", "num_ranks", "options"),
    [
        (3, 2, {"param_dtype": "bf16"}),
        (1, 2, {}),
        *(
            deep(stage, n, options)
            for stage in range(1, 4)
            for n in (2, 3)
            for options in ({}, {"param_dtype": "bf16"}, {"param_dtype": "bf16", "offload": "optimizer"})
        ),
    ],
)
def test_numbers_are_those_of_gathering_in_full(pool: Pool, stage: int, num_ranks: int, options: dict) -> None:
    full, small = (pool.run(trained, num_ranks, stage, in_float8, options) for in_float8 in (False, True))
    for (losses, sent, moved), (same, fewer, moved_small) in zip(full, small, strict=True):
        assert same == losses
        assert losses[-1] < losses[0]
        assert (moved, moved_small > 0) == (0, True)
        assert fewer < sent
