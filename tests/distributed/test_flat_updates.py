"""Optimizers over flat shards: one update for all of a run, the numbers those of updates parameter by parameter."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

import zgraph
from zgraph.bridge import private_runtime
from zgraph.compiler.compiled_model import compiled_model
from zgraph.optim import SGD, AdamW, Lion, flat

from .lockstep import local, own_part
from .nets import Odd, built
from .pool import Pool

SGD_OPTIONS = {"lr": 0.05, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}
OPTIMIZERS: dict[str, tuple[Callable, Callable]] = {
    "adamw": (functools.partial(AdamW, lr=1e-2), functools.partial(torch.optim.AdamW, lr=1e-2, fused=True)),
    "sgd": (functools.partial(SGD, **SGD_OPTIONS), functools.partial(torch.optim.SGD, **SGD_OPTIONS)),
    # alone and plain, Lion is compared with the paper in tests/single
    "lion": (functools.partial(Lion, lr=1e-2, weight_decay=0.1),) * 2,
}
NUM_STEPS = 10


def give_gradients(model: nn.Module, step: int) -> None:
    """Random ones; at each third step one parameter in the middle has none."""
    dice = torch.Generator().manual_seed(step)
    for name, parameter in model.named_parameters():
        whole = torch.randn(parameter.shape, generator=dice).to(parameter.dtype)
        if step % 3 == 2 and name == "first.weight":
            parameter.grad = None
        elif isinstance(parameter, DTensor):
            own = own_part(whole, parameter) if isinstance(parameter.placements[-1], Shard) else whole
            parameter.grad = private_runtime.dtensor_like(own, parameter)
        else:
            parameter.grad = whole


def error(model: nn.Module, reference: nn.Module) -> float:
    """The largest distance of a parameter, over its norm."""
    wanted = dict(reference.named_parameters())
    found = [(local(p.detach()), own_part(wanted[n].detach(), p)) for n, p in model.named_parameters()]
    return max(float((a - b).norm() / b.norm()) for a, b in found if b.numel())


@contextmanager
def counted() -> Iterator[list[int]]:
    """How many pieces each update had."""
    sizes: list[int] = []
    really = flat.FlatOptimizer._update

    def update(self: flat.FlatOptimizer, group: dict, age: float, pieces: list) -> None:
        sizes.append(len(pieces))
        really(self, group, age, pieces)

    with mock.patch.object(flat.FlatOptimizer, "_update", update):
        yield sizes


def update(mesh: DeviceMesh, stage: int, name: str, kernels: str) -> tuple[float, list[int]]:
    """Steps, half of them by an optimizer that takes the state over; and what the first step updated at once."""
    make, make_reference = OPTIMIZERS[name]
    model, reference = zgraph.compile(built(Odd)(), stage=stage, mesh=mesh), built(Odd)()
    optimizer, plain = make(model.parameters(), kernels=kernels), make_reference(reference.parameters())
    for step in range(NUM_STEPS):
        if step == NUM_STEPS // 2:
            state = get_optimizer_state_dict(model, optimizer)
            optimizer = make(model.parameters(), kernels=kernels)
            set_optimizer_state_dict(model, optimizer, state)
        for net, stepped in ((model, optimizer), (reference, plain)):
            give_gradients(net, step)
            with counted() as sizes:
                stepped.step()
            if net is model and step == 0:
                found = sizes
    moment = "momentum_buffer" if name == "sgd" else "exp_avg"
    assert all(s[moment].shape == p.shape and type(s[moment]) is type(p.data) for p, s in optimizer.state.items())
    return error(model, reference), found


@pytest.mark.parametrize("stage", range(4))
def test_updates_of_uneven_shards_are_those_of_whole_parameters(pool: Pool, stage: int) -> None:
    for name in OPTIMIZERS:
        for kernels in ("aten", "triton"):
            for worst, sizes in pool.run(update, 2, stage, name, kernels):
                assert worst <= 1e-6, f"{name} by {kernels}"
                assert sum(sizes) == (6 if stage == 0 else 2), "all shards at once, and what has no dimensions"


def in_groups(mesh: DeviceMesh) -> tuple[float, list[int]]:
    """Every second parameter in a group of its own: neighbours of one group only are updated together."""

    def make(net: nn.Module, kind: Callable) -> torch.optim.Optimizer:
        listed = [p for p in net.parameters() if p.dim()]
        return kind([{"params": listed[:2]}, {"params": listed[2:3], "lr": 0.1}, {"params": listed[3:]}], lr=1e-2)

    model, reference = zgraph.compile(built(Odd)(), stage=3, mesh=mesh), built(Odd)()
    optimizers = make(model, AdamW), make(reference, functools.partial(torch.optim.AdamW, fused=True))
    for step in range(4):
        for net, optimizer in zip((model, reference), optimizers, strict=True):
            give_gradients(net, step)
            with counted() as sizes:
                optimizer.step()
            if net is model and step == 0:
                found = sizes
    return error(model, reference), found


def test_groups_are_updated_apart(pool: Pool) -> None:
    for worst, sizes in pool.run(in_groups, 2):
        assert worst <= 1e-6
        assert sizes == [1, 1, 1]


def copies(mesh: DeviceMesh, stage: int, kernels: str) -> tuple[float, int]:
    """Masters on the host with bfloat16 copies beside them, which the store casts only if something else wrote."""
    model = zgraph.compile(built(Odd)(), stage=stage, mesh=mesh, param_dtype=torch.bfloat16, offload="parameters")
    reference, store = built(Odd)(), compiled_model(model).session.store
    optimizer = AdamW(model.parameters(), lr=1e-2, kernels=kernels)
    plain = torch.optim.AdamW(reference.parameters(), lr=1e-2, fused=True)
    store.copies.refresh()
    for step in range(NUM_STEPS):
        for net, stepped in ((model, optimizer), (reference, plain)):
            give_gradients(net, step)
            stepped.step()
        with mock.patch.object(torch.Tensor, "copy_", side_effect=AssertionError("cast a second time")):
            store.copies.refresh()
        for slot in store.slots.values():
            assert slot.working.dtype is torch.bfloat16
            rounding = 2**-7 if kernels == "triton" else 0  # Triton's interpreter does not round to the nearest
            torch.testing.assert_close(slot.working, slot.rest.bfloat16(), rtol=rounding, atol=0)
    worst = error(model, reference)
    with torch.no_grad():
        model.first.weight.zero_()
    store.copies.refresh()
    return worst, int(store.slots["first.weight"].working.count_nonzero())


@pytest.mark.parametrize(("stage", "kernels"), [(0, "aten"), (1, "triton"), (3, "aten")])
def test_copies_to_compute_with_are_written_by_the_update(pool: Pool, stage: int, kernels: str) -> None:
    for worst, num_left in pool.run(copies, 2, stage, kernels):
        assert worst <= 1e-6
        assert num_left == 0
