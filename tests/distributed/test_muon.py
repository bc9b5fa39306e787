"""Muon over shards: the same numbers as on one rank, whatever the stage, and a state that is loaded by any number."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

import zgraph
from zgraph.errors import UsageError
from zgraph.optim import Muon

from .nets import WORDS, Decoder, built, sentences, words
from .pool import Pool
from .test_flat_updates import error, give_gradients

MATRICES = {"conv.weight", "first.weight", "tall.weight", "few"}


class Mixed(nn.Module):
    """Embedding, convolution, matrices of odd sizes, one with fewer rows than ranks, and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 7)
        self.conv = nn.Conv1d(7, 5, 3, padding=1)
        self.first = nn.Linear(5, 13)
        self.tall = nn.Linear(13, 29, bias=False)
        self.few = nn.Parameter(torch.randn(2, 29))
        self.head = nn.Linear(7, WORDS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.conv(self.embed(ids).T).T
        hidden = self.tall(torch.tanh(self.first(hidden))) @ self.few.T
        return F.cross_entropy(self.head(F.pad(hidden, (0, 5))), ids.roll(1))


def updated(
    mesh: DeviceMesh, stage: int, dtype: torch.dtype, offload: str | None, has_copies: bool = False
) -> tuple[float, set[str]]:
    """How far parameters are from those of one rank, and which of them have a momentum."""
    mesh = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("replicate", "shard")) if has_copies else mesh
    make = functools.partial(
        Muon, lr=0.02, adam_lr=1e-2, ns_dtype=dtype, bucket_bytes=1000, adjust_lr_fn="match_rms_adamw"
    )
    model, reference = zgraph.compile(built(Mixed)(), stage=stage, mesh=mesh, offload=offload), built(Mixed)()
    optimizer = make(model.parameters())
    plain = make(reference.named_parameters(), use_muon=MATRICES.__contains__)
    for step in range(6):
        if step == 3:
            state = get_optimizer_state_dict(model, optimizer)
            optimizer = make(model.parameters())
            set_optimizer_state_dict(model, optimizer, state)
        for net, stepped in ((model, optimizer), (reference, plain)):
            give_gradients(net, step)
            stepped.step()
    names = {id(p): name for name, p in model.named_parameters()}
    return error(model, reference), {names[id(p)] for p, s in optimizer.state.items() if "momentum_buffer" in s}


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_updates_are_those_of_one_rank(pool: Pool, num_ranks: int) -> None:
    plain = [(stage, torch.float32, None) for stage in range(4)]
    copies = [(3, torch.float32, None, True)] if num_ranks == 4 else []
    for case in (*plain, (3, torch.bfloat16, None), (3, torch.float32, "optimizer"), *copies):
        for worst, with_momentum in pool.run(updated, num_ranks, *case):
            assert worst <= 1e-6, case
            assert with_momentum == MATRICES


def trained(mesh: DeviceMesh, stage: int) -> list[float]:
    """Losses of a decoder on the same four sentences, of which each rank has its part."""
    model = zgraph.compile(built(functools.partial(Decoder, num_layers=1))(), stage=stage, mesh=mesh)
    optimizer = Muon(model.parameters(), lr=0.02, adam_lr=3e-3, ns_dtype=torch.float32)
    found = []
    ids = sentences(0)[0]
    for _ in range(4):
        loss = model(ids.chunk(mesh.size())[mesh.get_local_rank()])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses = [torch.zeros(()) for _ in range(mesh.size())]
        torch.distributed.all_gather(losses, loss.detach(), group=mesh.get_group())
        found.append(float(torch.stack(losses).mean()))
    return found


def test_training_is_that_of_one_rank(pool: Pool) -> None:
    (alone,) = pool.run(trained, 1, 0)
    assert alone[-1] < alone[0]
    for num_ranks, stage in ((2, 3), (2, 0), (4, 1)):
        for losses in pool.run(trained, num_ranks, stage):
            assert max(abs(b - a) / a for a, b in zip(alone, losses, strict=True)) <= 1e-6, (num_ranks, stage)


CONFIG = {
    "train_batch_size": 12,
    "gradient_clipping": 0.0,
    "optimizer": {"type": "Muon", "params": {"muon_lr": 0.02, "adam_lr": 3e-3, "momentum": 0.9}},
}


def resumed(mesh: DeviceMesh, folder: str, stage: int, num_steps: int, save: bool) -> list[float]:
    """Losses of steps with the engine, after what was saved there."""
    config = CONFIG | {"zero_optimization": {"stage": stage}}
    engine, optimizer, _, _ = zgraph.initialize_engine(model=built(Mixed)(), config=config, mesh=mesh)
    assert isinstance(optimizer, Muon)
    assert {g["use_muon"]: g["lr"] for g in optimizer.param_groups} == {True: 0.02, False: 3e-3}
    if not save:
        assert engine.load_checkpoint(folder)[0] is not None
    losses = []
    for step in range(engine.global_steps, engine.global_steps + num_steps):
        loss = engine(*words(step, 12))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    if save:
        engine.save_checkpoint(folder)
    return losses


def test_a_state_is_loaded_by_another_number_of_ranks(pool: Pool, tmp_path: Path) -> None:
    pool.run(resumed, 2, str(tmp_path), 3, 3, True)
    wanted = pool.run(resumed, 2, str(tmp_path), 3, 3, False)[0]
    for num_ranks, stage in ((1, 0), (3, 3), (4, 1)):
        for losses in pool.run(resumed, num_ranks, str(tmp_path), stage, 3, False):
            assert max(abs(b - a) / a for a, b in zip(wanted, losses, strict=True)) <= 1e-5, (num_ranks, stage)


def uneven(mesh: DeviceMesh) -> str:
    model = zgraph.compile(built(Mixed)(), stage=3, mesh=mesh)
    optimizer = Muon(model.parameters())
    give_gradients(model, 0)
    if mesh.get_local_rank() == 1:
        model.tall.weight.grad = None
    try:
        optimizer.step()
    except UsageError as problem:
        return str(problem)
    return "nothing was raised"


def test_gradients_that_not_all_ranks_have_are_an_error_everywhere(pool: Pool) -> None:
    for text in pool.run(uneven, 2):
        assert "some ranks have a gradient of tall.weight, and some have none" in text


def overridden(mesh: DeviceMesh) -> list[list[str]]:
    """The names of what Muon updates: by a function of names, and in a group of its own."""

    def of(optimizer: Muon) -> list[str]:
        chosen: Iterable[nn.Parameter] = (p for g in optimizer.param_groups if g["use_muon"] for p in g["params"])
        return sorted(names[id(p)] for p in chosen)

    model = zgraph.compile(built(Mixed)(), stage=3, mesh=mesh)
    names = {id(p): name for name, p in model.named_parameters()}
    by_name = Muon(model.parameters(), use_muon=lambda name: name.startswith("embed"))
    groups = [{"params": [model.few], "use_muon": False}, {"params": [model.tall.weight, model.embed.weight]}]
    return [of(by_name), of(Muon(groups))]


def test_the_user_goes_before_the_roles(pool: Pool) -> None:
    assert pool.run(overridden, 2)[0] == [["embed.weight"], ["tall.weight"]]
