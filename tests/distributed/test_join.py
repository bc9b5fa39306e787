"""`zgraph.join`: loaders of other lengths, as DDP's Join takes them; without it, an error that says who left."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import DeviceMesh

import zgraph
from zgraph.errors import PlanMismatchError

from .lockstep import ddp
from .nets import Mlp, built, rows
from .pool import Pool

COUNTS = {"the last ends first": (3, 1), "the first ends first": (1, 3), "one has none": (0, 2)}


def joined(mesh: DeviceMesh, stage: int, fullgraph: bool | str) -> list[tuple[float, int]]:
    """For each pair of loaders, how far the parameters are from DDP's, and the steps that counted for nothing."""
    rank = mesh.get_local_rank()
    found = []
    for counts in COUNTS.values():
        batches = [rows(10 * number + rank) for number in range(counts[rank])]
        model = zgraph.compile(built(Mlp)(), stage=stage, mesh=mesh, fullgraph=fullgraph)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        over = 0
        with zgraph.join(model) as loop:
            for batch in loop(batches):
                over += loop.is_over
                model(*batch).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1e3)
                optimizer.step()
                optimizer.zero_grad()
        reference = ddp(built(Mlp)(), mesh)
        theirs = torch.optim.SGD(reference.parameters(), lr=0.1)
        with Join([reference]):  # type: ignore[list-item]
            for batch in batches:
                reference(*batch).backward()
                theirs.step()
                theirs.zero_grad()
        pairs = zip(model.parameters(), reference.parameters(), strict=True)
        gap = max(float((getattr(p, "full_tensor", p.clone)() - q).abs().max()) for p, q in pairs)
        found.append((gap, over))
    return found


@pytest.mark.parametrize(("stage", "fullgraph"), [(0, True), (1, True), (3, True), (3, "eager")])
def test_loaders_of_other_lengths_train_as_under_ddps_join(pool: Pool, stage: int, fullgraph: bool | str) -> None:
    for rank, found in enumerate(pool.run(joined, 2, stage, fullgraph, limit_s=200)):
        for (gap, over), counts in zip(found, COUNTS.values(), strict=True):
            assert gap <= 1e-6
            assert over == max(counts) - counts[rank]


def test_one_rank_takes_its_loader_as_it_is() -> None:
    model = zgraph.compile(built(Mlp)())
    with zgraph.join(model) as loop:
        assert [*loop([1, 2])] == [1, 2]
        assert not loop.is_over


def left_for_a_barrier(mesh: DeviceMesh) -> tuple[str, float]:
    """Words to a rank that trains on while the other waits in a barrier, and after how many seconds."""
    model = zgraph.compile(built(Mlp)(), mesh=mesh)
    model(*rows(0)).backward()
    began, said = time.monotonic(), "nothing was raised"
    try:
        if mesh.get_local_rank() == 0:
            model(*rows(1))
    except PlanMismatchError as error:
        said = str(error)
    seconds = time.monotonic() - began
    dist.barrier(mesh.get_group())
    return said, seconds


def test_a_rank_that_left_the_loop_for_a_barrier_is_named(pool: Pool) -> None:
    text, seconds = pool.run(left_for_a_barrier, 2, spoils=True)[0]
    assert "rank 1 made fewer calls of the model and waits in torch.distributed's barrier (test_join.py:" in text
    assert "zgraph.join(model)" in text
    assert seconds < 30
