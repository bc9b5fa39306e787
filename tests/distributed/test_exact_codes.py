"""Parameters gathered as exact codes: training is the same to the last bit, and what changed little takes few bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import zgraph
from tests.deep import deep
from zgraph.compiler.compiled_model import compiled_model

from .pool import Pool

BF16 = torch.bfloat16


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(40, 67), nn.Tanh(), nn.Linear(67, 67), nn.Tanh(), nn.Linear(67, 5)]
    layers[2].weight.requires_grad_(False)
    return nn.Sequential(*layers)


def step_of(model: Any, optimizer: torch.optim.Optimizer, step: int, rank: int) -> float:
    x = torch.randn(16, 40, generator=torch.Generator().manual_seed(100 * step + rank))
    loss = (model(x).float() - x[:, :5].tanh()).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def trained(
    mesh: DeviceMesh, stage: int, compress: str | None
) -> tuple[list[float], list[torch.Tensor], int, int, str]:
    """Losses, parameters, bytes that the last step sent and that its plan predicts, and the report.

    Between steps there are evaluations, whose buckets are others, and somebody loads other parameters.
    """
    model = zgraph.compile(net(), mesh=mesh, stage=stage, compress=compress, param_dtype=BF16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    rank, found, sent = mesh.get_rank(), list[float](), list[int]()
    saved = {k: v.detach().clone() for k, v in model.state_dict().items()}
    for step in range(8):
        if step == 3:
            with torch.inference_mode():
                found.append(float(model(torch.ones(3, 40)).sum()))
        if step == 5:
            model.load_state_dict({k: 1.5 * v for k, v in saved.items()})
        if step == 7:
            count(compiled_model(model).session.lane, sent)
        found.append(step_of(model, optimizer, step, rank))
    parameters = [v.full_tensor() if hasattr(v, "full_tensor") else v for v in model.state_dict().values()]
    report = zgraph.report(model)
    return found, parameters, sum(sent), report.sent_bytes, str(report)


def count(lane: Any, sent: list[int]) -> None:
    """Have a lane note the bytes of each message that it sends."""
    post = lane._exchange

    def counting(number: int, receive: Any, send: Any) -> Any:
        sent.extend(tensor.nbytes for tensor, _, _ in send)
        return post(number, receive, send)

    lane._exchange = counting


@pytest.mark.parametrize(
    ("stage", "codec", "num_ranks"),
    [(2, "delta", 2), (3, "exponent", 2), deep(1, "delta", 3), deep(2, "delta", 4), deep(3, "exponent", 3)],
)
def test_training_is_the_same_to_the_last_bit(pool: Pool, stage: int, codec: str, num_ranks: int) -> None:
    plain = pool.run(trained, num_ranks, stage, None)
    for one, other in zip(plain, pool.run(trained, num_ranks, stage, codec), strict=True):
        assert one[0] == other[0]
        assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))
        assert other[2] < (0.8 if codec == "delta" else 0.9) * one[2]
        assert other[3] < one[3]
        assert "codes of this rank's parameters" in other[4]


def trained_in_rows(mesh: DeviceMesh, compress: str | None) -> list[float]:
    """Losses on two rows of two ranks, each with all shards; the second micro-step of each step changes nothing."""
    rows = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = zgraph.compile(net(), mesh=rows, stage=2, compress=compress, param_dtype=BF16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    losses, copies = [], compiled_model(model).session.copies
    for step in range(3):
        x = torch.randn(16, 40, generator=torch.Generator().manual_seed(100 * step + mesh.get_rank()))
        with zgraph.no_sync(model):
            model(x).float().square().mean().backward()
        before = copies.code_bytes
        losses.append(step_of(model, optimizer, step, mesh.get_rank()))
        assert copies.code_bytes - before == (24 if compress else 0), "a head"
    return losses


@pytest.mark.parametrize("codec", ["delta"])
def test_on_rows_that_each_have_all_shards_it_is_the_same(pool: Pool, codec: str) -> None:
    assert pool.run(trained_in_rows, 4, None) == pool.run(trained_in_rows, 4, codec)
