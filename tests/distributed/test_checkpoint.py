"""State dicts, and checkpoints that are saved on some number of ranks and loaded on another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

import zgraph

from .nets import Mlp, Normed, Odd, Tied, built, rows
from .pool import Pool

GLOBAL_ROWS = 12


class Trainer:
    """A model trained on a global batch that does not depend on the number of ranks."""

    def __init__(self, mesh: DeviceMesh, stage: int, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.mesh = mesh
        self.model: nn.Module = zgraph.compile(Odd(), stage=stage, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def steps(self, first: int, last: int) -> list[float]:
        """The losses of these steps, averaged over the ranks."""
        rank, size = self.mesh.get_local_rank(), self.mesh.size()
        losses = []
        for step in range(first, last):
            x, y = (t.chunk(size)[rank] for t in rows(step, GLOBAL_ROWS))
            loss = self.model(x, y)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            mean = loss.detach() / size
            dist.all_reduce(mean, group=self.mesh.get_group())
            losses.append(mean.item())
        return losses

    def save(self, path: Path) -> None:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=path, process_group=self.mesh.get_group())

    def load(self, path: Path) -> None:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=path, process_group=self.mesh.get_group())
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)


def save(mesh: DeviceMesh, path: Path) -> list[float]:
    trainer = Trainer(mesh, stage=3)
    trainer.steps(0, 4)
    trainer.save(path)
    return trainer.steps(4, 9)


def resume(mesh: DeviceMesh, path: Path, stage: int) -> list[float]:
    trainer = Trainer(mesh, stage, seed=1)
    trainer.load(path)
    return trainer.steps(4, 9)


def test_saved_on_four_ranks_and_resumed_on_other_numbers_and_stages(pool: Pool, tmp_path: Path) -> None:
    expected = pool.run(save, 4, tmp_path / "saved")[0]
    for num_ranks, stage in ((2, 1), (3, 2), (1, 0), (4, 3)):
        for losses in pool.run(resume, num_ranks, tmp_path / "saved", stage):
            assert losses == pytest.approx(expected, rel=1e-6), f"on {num_ranks} ranks, stage {stage}"


def load_plain(mesh: DeviceMesh, path: Path, stage: int) -> tuple[float, float]:
    """The loss of a compiled model after loading, and that of the plain model that was saved."""
    torch.manual_seed(2)
    model = zgraph.compile(Mlp(), stage=stage, mesh=mesh)
    first = model(*rows(0)).item()
    assert model.load_state_dict(torch.load(path)) == ([], [])
    second = model(*rows(0)).item()
    assert first != second
    return second, built(Mlp)()(*rows(0)).item()


@pytest.mark.parametrize("stage", range(4))
def test_a_plain_state_dict_loads(pool: Pool, tmp_path: Path, stage: int) -> None:
    torch.save(built(Mlp)().state_dict(), tmp_path / "plain.pt")
    for ours, expected in pool.run(load_plain, 3, tmp_path / "plain.pt", stage):
        assert ours == pytest.approx(expected, rel=1e-6)


def names_and_values(mesh: DeviceMesh, stage: int) -> None:
    for kind in (Mlp, Odd, Tied, Normed):
        plain = built(kind)()
        model = zgraph.compile(built(kind)(), stage=stage, mesh=mesh)
        assert type(model) is kind
        assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
        state = model.state_dict()
        assert list(state) == list(plain.state_dict())
        for name, value in plain.state_dict().items():
            whole = state[name].full_tensor() if isinstance(state[name], DTensor) else state[name]
            assert torch.equal(whole, value), name


@pytest.mark.parametrize("stage", range(4))
def test_a_state_dict_has_the_names_and_the_values_of_the_plain_model(pool: Pool, stage: int) -> None:
    pool.run(names_and_values, 3, stage)


def all_start_from_the_first_rank(mesh: DeviceMesh, stage: int) -> bool:
    torch.manual_seed(mesh.get_local_rank())
    model = zgraph.compile(Mlp(), stage=stage, mesh=mesh)
    torch.manual_seed(0)
    expected = Mlp()
    return all(
        torch.equal(p.full_tensor() if isinstance(p, DTensor) else p, expected.get_parameter(n))
        for n, p in model.named_parameters()
    )


@pytest.mark.parametrize("stage", range(4))
def test_every_rank_takes_the_first_ranks_values(pool: Pool, stage: int) -> None:
    assert all(pool.run(all_start_from_the_first_rank, 3, stage))
