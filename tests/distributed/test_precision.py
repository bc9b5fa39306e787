"""Computing in bfloat16 with float32 masters, averaging in another dtype, autocast."""

import copy

import pytest
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import zgraph

from .lockstep import Lockstep, Side, adamw, assert_same, ddp, gradient_error
from .nets import Mlp, built, rows
from .pool import Pool

NUM_STEPS = 10


class Masters(Side):
    """The reference: DDP computes on a bfloat16 copy of the weights, and AdamW steps float32 masters."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.masters = built(Mlp)()
        super().__init__(ddp(copy.deepcopy(self.masters).bfloat16(), mesh), adamw(self.masters.parameters()))

    def accumulate(self, seed: int, inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
        super().accumulate(seed, (inputs[0].bfloat16(), inputs[1]))
        for master, computed in zip(self.masters.parameters(), self.model.parameters(), strict=True):
            master.grad = computed.grad.float()
            computed.grad = None

    def update(self) -> None:
        super().update()
        with torch.no_grad():
            for master, computed in zip(self.masters.parameters(), self.model.parameters(), strict=True):
                computed.copy_(master)


def compute_in_bf16(mesh: DeviceMesh, stage: int) -> tuple[float, float]:
    theirs, rank = Masters(mesh), mesh.get_local_rank()
    model = zgraph.compile(built(Mlp)(), stage=stage, mesh=mesh, param_dtype=torch.bfloat16)
    ours = Side(model, adamw(model.parameters()))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    worst = 0.0
    for step in range(NUM_STEPS):
        for side in (theirs, ours):
            side.accumulate(0, rows(10 * step + rank))
        assert model(*rows(rank)).dtype is torch.bfloat16
        worst = max(worst, gradient_error(theirs.masters, model))
        theirs.update()
        ours.update()
    return max(abs(a - b) / a for a, b in zip(theirs.losses, ours.losses, strict=True)), worst


@pytest.mark.parametrize("stage", range(4))
def test_bf16_compute_on_fp32_masters(pool: Pool, stage: int) -> None:
    """On two ranks, the mean of two bfloat16 numbers is rounded once whoever takes it: the same to the last bit."""
    assert_same(pool.run(compute_in_bf16, 2, stage), 1e-6, 1e-6)


def bf16_hook(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Has DDP average a bucket in bfloat16 (torch's own hook for that refuses gloo)."""
    sent = bucket.buffer().bfloat16().div_(dist.get_world_size(group))
    dist.all_reduce(sent, group=group)
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer().copy_(sent))
    return done


def average_in_bf16(mesh: DeviceMesh, stage: int) -> tuple[float, float]:
    pair = Lockstep(mesh, built(Mlp), stage=stage, reduce_dtype=torch.bfloat16)
    pair.reference.model.register_comm_hook(mesh.get_group(), bf16_hook)
    for step in range(NUM_STEPS):
        pair.step(rows(10 * step + pair.rank))
    return pair.errors


@pytest.mark.parametrize("stage", range(4))
def test_gradients_averaged_in_bf16(pool: Pool, stage: int) -> None:
    assert_same(pool.run(average_in_bf16, 2, stage))


def average_in_fp32(mesh: DeviceMesh, reduce_dtype: torch.dtype | None) -> float:
    """How far the gradients of a model in bfloat16 are from the float32 mean of the ranks' bfloat16 gradients."""
    rank = mesh.get_local_rank()
    total: dict[str, torch.Tensor] = {}
    for other in range(mesh.size()):
        model = built(Mlp)().bfloat16()
        x, y = rows(other)
        model(x.bfloat16(), y).backward()
        for name, parameter in model.named_parameters():
            total[name] = total.get(name, 0) + parameter.grad.float() / mesh.size()
    expected = built(Mlp)()
    for name, parameter in expected.named_parameters():
        parameter.grad = total[name]
    model = zgraph.compile(built(Mlp)(), mesh=mesh, param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
    model(*rows(rank)).backward()
    return gradient_error(expected, model)


def test_reduce_dtype_is_what_gradients_are_averaged_in(pool: Pool) -> None:
    """Three ranks: 1/3 is not exact. float32 is right to 1e-6; bfloat16 (8 bits) is not, but to 1e-2."""
    assert max(pool.run(average_in_fp32, 3, torch.float32)) <= 1e-6
    assert 1e-4 < max(pool.run(average_in_fp32, 3, None)) <= 1e-2


def autocast(mesh: DeviceMesh, stage: int) -> tuple[float, float]:
    pair = Lockstep(mesh, built(Mlp), around_forward=lambda: torch.autocast("cpu", torch.bfloat16), stage=stage)
    for step in range(NUM_STEPS):
        pair.step(rows(10 * step + pair.rank))
    return pair.errors


@pytest.mark.parametrize("stage", range(4))
def test_autocast(pool: Pool, stage: int) -> None:
    assert_same(pool.run(autocast, 2, stage))
