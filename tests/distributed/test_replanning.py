"""Ranks that are out of memory in their first step: all at one place, at different ones, or one alone."""

import time
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

import zgraph
from tests.single.scarce import Scarce, failing
from zgraph.compiler import replanning
from zgraph.compiler.compiled_model import compiled_model
from zgraph.errors import PeerError

from .pool import Pool


def built(mesh: DeviceMesh) -> torch.nn.Module:
    torch.manual_seed(0)
    return zgraph.compile(Scarce(), mesh=mesh, stage=3)


def trained(model: torch.nn.Module, rank: int) -> list[float]:
    torch.manual_seed(1)
    found = []
    for step in range(2):
        loss = model(torch.ones(16, 32) + step + rank)
        loss.backward()
        found += [loss.item(), *(float(p.grad.to_local().norm()) for p in model.parameters())]
        model.zero_grad()
    return found


def short(mesh: DeviceMesh, phase: str) -> tuple[list[float], list[float], int | None]:
    """The numbers of a model that has memory, those of one that had not, and its budget afterwards."""
    torch.compiler.reset()
    rank = mesh.get_rank()
    wanted = trained(built(mesh), rank)
    torch.compiler.reset()
    model = built(mesh)
    with failing(phase):
        if phase == "backward":
            torch.manual_seed(1)
            loss = model(torch.ones(16, 32) + rank)
            with pytest.raises(torch.OutOfMemoryError):
                loss.backward()
            model.zero_grad()
        found = trained(model, rank)
    assert compiled_model(model).is_replanned
    return wanted, found, compiled_model(model).context.memory_budget


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_ranks_that_are_out_of_memory_at_one_place_plan_again_together(pool: Pool, phase: str) -> None:
    answers = pool.run(short, 2, phase)
    for wanted, found, _ in answers:
        assert found == pytest.approx(wanted)
    assert len({budget for *_, budget in answers}) == 1


def apart(mesh: DeviceMesh, phases: tuple[tuple[str, ...], ...]) -> tuple[str, float]:
    """How a rank's first step ends, and after how many seconds."""
    torch.compiler.reset()
    rank = mesh.get_rank()
    model = built(mesh)
    began = time.perf_counter()
    error: Any = None
    with patch.object(replanning, "AGREE_S", 2.0), failing(*phases[rank]):
        try:
            model(torch.ones(16, 32)).backward()
        except (torch.OutOfMemoryError, PeerError) as raised:
            error = raised
    assert not compiled_model(model).is_replanned
    notes = " ".join(getattr(error, "__notes__", []))
    return f"{type(error).__name__} {'memory_budget' in notes}", time.perf_counter() - began


@pytest.mark.parametrize("phases", [(("forward",), ("backward",)), (("backward",), ()), ((), ("forward",))])
def test_a_rank_that_is_out_of_memory_alone_is_an_error_on_all(pool: Pool, phases: tuple[tuple[str, ...], ...]) -> None:
    """Nobody waits for it for long."""
    answers = pool.run(apart, 2, phases)
    for (how, seconds), failed in zip(answers, phases, strict=True):
        assert how in (["OutOfMemoryError True"] * bool(failed) + ["PeerError False"])
        assert seconds < 60
    assert "OutOfMemoryError True" in [how for how, _ in answers]
