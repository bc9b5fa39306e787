"""Codes along the outer of two axes, on two rows of two ranks: near plain training, in fewer bytes, and resumed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import zgraph
from tests.deep import deep
from zgraph.compiler.compiled_model import compiled_model
from zgraph.runtime import coded

from .pool import Pool
from .test_compress import net, step_of
from .test_exact_codes import count

NUM_STEPS = 40
CODECS = ["q8(block=256)", "q4(block=128)", "sign(block=64)", "topk(5%, chunk=512)"]


def model_on(rows: DeviceMesh, stage: int, compress: Any) -> tuple[Any, torch.optim.Optimizer]:
    model = zgraph.compile(net(), mesh=rows, stage=stage, compress=compress)
    return model, torch.optim.AdamW(model.parameters(), lr=3e-3)


def counting(sent: list[int]) -> None:
    """Count what collectives of torch's own send, in bytes of this rank."""
    coded.dist = Counting(sent)  # type: ignore[attr-defined]


class Counting:
    """torch.distributed, which notes the bytes that this rank sends."""

    def __init__(self, sent: list[int]) -> None:
        self.sent = sent

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def all_to_all_single(self, out: torch.Tensor, own: torch.Tensor, *, group: Any, async_op: bool) -> Any:
        self.sent.append(own.nbytes // 2)
        return dist.all_to_all_single(out, own, group=group, async_op=async_op)

    def all_gather_into_tensor(self, out: torch.Tensor, own: torch.Tensor, *, group: Any, async_op: bool) -> Any:
        self.sent.append(own.nbytes)
        return dist.all_gather_into_tensor(out, own, group=group, async_op=async_op)


def trained(mesh: DeviceMesh, stage: int, compress: Any) -> tuple[list[float], int, int, list[torch.Tensor]]:
    """Losses, the bytes that the last step sends and that its plan predicts, and the parameters in the end."""
    rows = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model, optimizer = model_on(rows, stage, compress)
    losses, sent = list[float](), list[int]()
    for step in range(NUM_STEPS):
        if step == NUM_STEPS - 1:
            count(compiled_model(model).session.lane, sent)
            counting(sent)
        losses.append(step_of(model, optimizer, step, mesh.get_rank()))
    coded.dist = dist  # type: ignore[attr-defined]
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
        assert sent < whole
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
