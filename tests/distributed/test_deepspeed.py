"""DeepSpeed's names on two ranks: whole parameters for a while, and what its utilities read and write."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

import zgraph.deepspeed as deepspeed
from zgraph.deepspeed import utils, zero
from zgraph.errors import UsageError

from .nets import Odd, built, rows
from .pool import Pool

STAGES = [0, 1, 3]


def engine_of(mesh: DeviceMesh, stage: int, **keys: Any) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 6,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        **keys,
    }
    return deepspeed.initialize(model=built(Odd)(), config=config, mesh=mesh)[0]


def whole_of(parameter: Any) -> torch.Tensor:
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()


def written(parameter: torch.Tensor, *, counts: bool) -> None:
    """Write to a parameter, with or without a count of it: shards tell by their bytes, too."""
    (parameter.detach() if counts else parameter.data).zero_()


def lent(mesh: DeviceMesh, stage: int) -> None:
    """Reads on one rank alone, changes on one, changes that are refused, and training on."""
    rank = mesh.get_local_rank()
    engine, plain = engine_of(mesh, stage), built(Odd)()
    held = dict(engine.module.named_parameters())
    with zero.GatheredParameters(engine.module.parameters()):
        if rank == 1:  # ranks do not meet in here
            for name, parameter in plain.named_parameters():
                assert torch.equal(engine.module.get_parameter(name), parameter), name
                assert held[name].data.norm() == parameter.norm()
    with zero.GatheredParameters(engine.module.first.weight, modifier_rank=1):
        if rank == 1:
            nn.init.constant_(engine.module.first.weight, 2.0)
    with zero.GatheredParameters([held["first.bias"]], modifier_rank=0), torch.no_grad():
        held["first.bias"].fill_(7.0 if rank == 0 else 5.0)
    assert (whole_of(engine.module.first.weight) == 2).all()
    assert (whole_of(engine.module.first.bias) == 7).all()
    assert engine.module.first.bias is held["first.bias"]
    with torch.no_grad():
        plain.first.weight.fill_(2.0)
        plain.first.bias.fill_(7.0)
    batch = rows(rank, 6)
    torch.testing.assert_close(engine(*batch), plain(*batch))
    with pytest.raises(UsageError, match="modifier_rank=0"), zero.GatheredParameters(engine.module.parameters()):
        written(engine.module.first.weight, counts=stage == 0)
    if stage == 3:
        assert (whole_of(engine.module.first.weight) == 2).all()  # what was refused is lost
        with (
            pytest.raises(UsageError, match=r"zgraph\.gathered\(model\)"),
            zero.GatheredParameters(engine.module.first.weight),
        ):
            engine(*batch)
    with zero.GatheredParameters(engine.module.parameters(), enabled=False):
        assert isinstance(engine.module.first.weight, DTensor) == (stage > 0)


@pytest.mark.parametrize("stage", STAGES)
def test_parameters_are_whole_for_a_while(pool: Pool, stage: int) -> None:
    pool.run(lent, 2, stage)


def built_together(mesh: DeviceMesh) -> list[float]:
    """A model that one rank changes before it is compiled."""
    with zero.Init():
        model = built(Odd)()
    with zero.GatheredParameters(model.first.weight, modifier_rank=1):
        if mesh.get_local_rank() == 1:
            nn.init.constant_(model.first.weight, 3.0)
    return [model.first.weight.min().item(), model.first.weight.max().item()]


def test_a_model_that_is_not_compiled_yet(pool: Pool) -> None:
    assert pool.run(built_together, 4) == [[3.0, 3.0]] * 4  # all ranks that there are


def asked(mesh: DeviceMesh, stage: int) -> None:
    """Masters, gradients and moments of an accumulated step are those of plain training; what is set is used."""
    rank, ranks = mesh.get_local_rank(), mesh.size()
    engine, plain = engine_of(mesh, stage, gradient_accumulation_steps=2), built(Odd)()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    names = [name for name, _ in plain.named_parameters()]
    ours, theirs = dict(engine.module.named_parameters()), dict(plain.named_parameters())
    assert utils.safe_get_full_grad(ours[names[0]]) is None
    assert utils.safe_get_full_optimizer_state(ours[names[0]], "exp_avg") is None
    with pytest.raises(UsageError, match=r"call engine\.backward first"):
        utils.safe_set_full_grad(ours[names[0]], theirs[names[0]])
    with pytest.raises(UsageError, match="take a step first"):
        utils.safe_set_full_optimizer_state(ours[names[0]], theirs[names[0]], "exp_avg")
    for micro in range(2):
        if micro:
            engine.step()
        losses = [plain(*rows(10 * micro + at, 6)) for at in range(ranks)]
        (sum(losses) / (2 * ranks)).backward()
        engine.backward(engine(*rows(10 * micro + rank, 6)))
        for name in names:
            torch.testing.assert_close(utils.safe_get_full_grad(ours[name]), theirs[name].grad)
    with torch.no_grad():
        for name in names:
            theirs[name].grad.mul_(0.5)
            utils.safe_set_full_grad(ours[name], 0.5 * utils.safe_get_full_grad(ours[name]))
            utils.safe_set_local_grad(ours[name], 2 * utils.safe_get_local_grad(ours[name]))
            theirs[name].grad.mul_(2)
    optimizer.step()
    engine.step()
    for name in names:
        torch.testing.assert_close(utils.safe_get_full_fp32_param(ours[name]), theirs[name].detach())
        for key in ("exp_avg", "exp_avg_sq"):
            state = optimizer.state[theirs[name]][key]
            torch.testing.assert_close(utils.safe_get_full_optimizer_state(ours[name], key), state)
            utils.safe_set_full_optimizer_state(ours[name], state + 1, key)
            utils.safe_set_local_optimizer_state(
                ours[name], utils.safe_get_local_optimizer_state(ours[name], key) + 1, key
            )
            torch.testing.assert_close(utils.safe_get_full_optimizer_state(ours[name], key), state + 2)
        utils.safe_set_full_fp32_param(ours[name], theirs[name].detach() + 1)
        utils.safe_set_local_fp32_param(ours[name], utils.safe_get_local_fp32_param(ours[name]) + 1)
        torch.testing.assert_close(utils.safe_get_full_fp32_param(ours[name]), theirs[name].detach() + 2)
    with torch.no_grad():
        for parameter in theirs.values():
            parameter.add_(2)
    batch = rows(rank, 6)
    torch.testing.assert_close(engine(*batch), plain(*batch))
    with pytest.raises(UsageError, match="must have the shape"):
        utils.safe_set_full_fp32_param(ours[names[0]], torch.ones(1))
    with pytest.raises(UsageError, match=r"no state 'momentum' of it; those are"):
        utils.safe_get_full_optimizer_state(ours[names[0]], "momentum")


@pytest.mark.parametrize("stage", STAGES)
def test_masters_gradients_and_states_are_read_and_written(pool: Pool, stage: int) -> None:
    pool.run(asked, 2, stage)


def spoken(mesh: DeviceMesh) -> tuple[float, float, int, int, list[int]]:
    comm, tensor = deepspeed.comm, torch.ones(2)
    comm.all_reduce(tensor)
    first = torch.full((1,), float(comm.get_rank()))
    comm.broadcast(first, 2)
    comm.barrier()
    return tensor[0].item(), first.item(), comm.get_rank(), comm.get_world_size(), comm.get_all_ranks_from_group()


def test_collectives_are_torchs(pool: Pool) -> None:
    assert pool.run(spoken, 4) == [(4.0, 2.0, rank, 4, [0, 1, 2, 3]) for rank in range(4)]
