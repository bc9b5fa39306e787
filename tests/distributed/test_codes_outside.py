"""Codes along the outer of two axes, on two rows of two ranks: near plain training, in fewer bytes, and resumed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import zgraph
from tests.deep import deep
from zgraph.compiler.compiled_model import compiled_model

from .pool import Pool
from .test_compress import net, step_of
from .test_exact_codes import count

NUM_STEPS = 40
CODECS = ["q8(block=256)", "q4(block=128)", "q2(block=128)", "sign(block=64)", "topk(5%, chunk=512)"]


def model_on(rows: DeviceMesh, stage: int, compress: Any) -> tuple[Any, torch.optim.Optimizer]:
    model = zgraph.compile(net(), mesh=rows, stage=stage, compress=compress)
    return model, torch.optim.AdamW(model.parameters(), lr=3e-3)


def trained(mesh: DeviceMesh, stage: int, compress: Any) -> tuple[list[float], int, int, list[torch.Tensor]]:
    """Losses, the bytes that the last step sends and that its plan predicts, and the parameters in the end."""
    rows = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model, optimizer = model_on(rows, stage, compress)
    losses, sent = list[float](), list[int]()
    for step in range(NUM_STEPS):
        if step == NUM_STEPS - 1:
            count(compiled_model(model).session.lane, sent)
        losses.append(step_of(model, optimizer, step, mesh.get_rank()))
    weights = [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for p in model.parameters()]
    return losses, sum(sent), zgraph.report(model).sent_bytes, weights


@pytest.mark.parametrize(
    ("stage", "compress"),
    [
        (2, {"gradients": CODECS[0], "parameters": "q8"}),
        (0, CODECS[1]),
        *(deep(stage, codec) for stage in range(4) for codec in CODECS),
        deep(3, {"gradients": "q4", "parameters": "q8"}),
    ],
)
def test_training_is_near_what_it_is_without(pool: Pool, stage: int, compress: Any) -> None:
    plain, others = (pool.run(trained, 4, stage, c) for c in (None, compress))
    for (wanted, whole, _, _), (losses, sent, predicted, weights) in zip(plain, others, strict=True):
        first, last = sum(losses[:5]), sum(losses[-5:])
        assert last < 0.5 * first, "it learns something"
        assert losses != wanted
        assert abs(last - sum(wanted[-5:])) < (0.05 if "q8" in str(compress) else 0.25) * first
        assert all(torch.equal(a, b) for a, b in zip(weights, others[0][3], strict=True)), "rows stay alike"
        assert sent < (0.8 if isinstance(compress, str) else 0.55) * whole
        assert abs(sent - predicted) <= 0.02 * predicted


def resumed(mesh: DeviceMesh, stage: int, codec: str) -> tuple[list[float], list[float], float]:
    """Losses after a checkpoint, of the run that goes on and of one that begins there; and what was due, at most."""
    rows = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model, optimizer = model_on(rows, stage, codec)
    rank = mesh.get_rank()
    for step in range(4):
        step_of(model, optimizer, step, rank)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), zgraph.feedback(model).state_dict()))
    on = [step_of(model, optimizer, step, rank) for step in range(4, 8)]
    again, other = model_on(rows, stage, codec)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    zgraph.feedback(again).load_state_dict(saved[2])
    due = [t.to_local() if hasattr(t, "to_local") else t for t in saved[2].values()]
    return on, [step_of(again, other, step, rank) for step in range(4, 8)], max(float(t.abs().max()) for t in due)


@pytest.mark.parametrize(("stage", "codec"), [(2, "q4"), deep(0, "sign(block=64)"), deep(3, "topk(5%, chunk=512)")])
def test_a_resumed_run_goes_on_with_what_is_due(pool: Pool, stage: int, codec: str) -> None:
    for on, again, due in pool.run(resumed, 4, stage, codec):
        assert on == again
        assert due > 0


def after_an_error(mesh: DeviceMesh) -> tuple[bool, list[bool]]:
    """Whether all ranks raise where one does in a backward; and whether the next steps are those of plain training."""
    rows = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model, _ = model_on(rows, 2, "q8")
    session, rank = compiled_model(model).session, mesh.get_rank()
    x = torch.randn(16, 24, generator=torch.Generator().manual_seed(rank))
    model(x).square().mean().backward()
    model.zero_grad()
    lane = session.lane
    assert lane is not None
    if rank == 0:
        lane.reduce_inside = failing  # type: ignore[method-assign]
    try:
        model(x).square().mean().backward()
        has_failed = False
    except Exception:
        has_failed = True
    model.zero_grad()
    wanted = net()
    loss = sum(
        wanted(torch.randn(16, 24, generator=torch.Generator().manual_seed(r))).square().mean() for r in range(4)
    )
    (loss / 4).backward()
    right, largest = [], max(float(p.grad.abs().max()) for p in wanted.parameters() if p.grad is not None)
    for _ in range(3):
        model(x).square().mean().backward()
        for made, due in zip(model.parameters(), wanted.parameters(), strict=True):
            assert made.grad is not None
            assert due.grad is not None
            right.append(bool((made.grad.full_tensor() - due.grad).abs().max() < 0.03 * largest))
        model.zero_grad()
    return has_failed, right


def failing(*_: Any) -> Any:
    raise RuntimeError("no memory")


def test_ranks_go_on_after_an_error(pool: Pool) -> None:
    for has_failed, right in pool.run(after_an_error, 4):
        assert has_failed
        assert all(right)


def largest(mesh: DeviceMesh) -> float:
    """The gradient of a sum that fp16 cannot hold, of which it holds the mean."""
    rows = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = zgraph.compile(
        torch.nn.Linear(64, 64, bias=False), mesh=rows, stage=2, compress="q8", param_dtype=torch.float16
    )
    (model(torch.full((1, 64), 40000.0, dtype=torch.float16)).sum()).backward()
    grad = model.weight.grad
    return float(grad.full_tensor().max())


def test_means_in_fp16_do_not_overflow(pool: Pool) -> None:
    assert all(abs(found - 40000) < 400 for found in pool.run(largest, 4))
