"""Gradients in codes: training is near what it is without, bytes are those that were predicted, and nothing is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

import zgraph
from tests.deep import deep
from zgraph.compiler.compiled_model import compiled_model

from .pool import Pool

CODECS = ["q8(block=256)", "q4(block=128)", "q2(block=128)", "sign(block=64)", "topk(5%, chunk=512)"]
NUM_STEPS = 40


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 67), nn.Tanh(), nn.Linear(67, 67), nn.Tanh(), nn.Linear(67, 5))


def batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(16, 24, generator=drawn)
    return x, torch.stack([x[:, i : i + 4].sum(1).tanh() for i in range(0, 20, 4)], 1)


def step_of(model: Any, optimizer: torch.optim.Optimizer, step: int, rank: int) -> float:
    x, y = batch(step, rank)
    loss = (model(x) - y).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def losses(mesh: DeviceMesh, stage: int, compress: str | None, steps: int = NUM_STEPS, **options: Any) -> list[float]:
    model = zgraph.compile(net(), mesh=mesh, stage=stage, compress=compress, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    return [step_of(model, optimizer, step, mesh.get_rank()) for step in range(steps)]


@pytest.mark.parametrize(
    ("codec", "stage", "num_ranks"),
    [
        (CODECS[0], 0, 2),
        (CODECS[1], 1, 3),
        (CODECS[2], 2, 2),
        (CODECS[3], 3, 2),
        *(deep(codec, stage, n) for codec in CODECS for stage in range(4) for n in (2, 3)),
    ],
)
def test_training_is_near_what_it_is_without(pool: Pool, codec: str, stage: int, num_ranks: int) -> None:
    plain, coded = (pool.run(losses, num_ranks, stage, compress) for compress in (None, codec))
    first, last = sum(plain[0][:5]), sum(plain[0][-5:])
    assert last < 0.5 * first, "it learns something"
    assert plain != coded
    for one, other in zip(plain, coded, strict=True):
        assert abs(sum(other[-5:]) - sum(one[-5:])) < (0.02 if codec == CODECS[0] else 0.25) * first


def counted(mesh: DeviceMesh, stage: int, compress: str | None) -> tuple[int, int, str]:
    """Bytes that a step sends on this rank, as counted and as predicted; and the report."""
    model = zgraph.compile(net(), mesh=mesh, stage=stage, compress=compress)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rank, session = mesh.get_rank(), compiled_model(model).session
    step_of(model, optimizer, 0, rank)
    lane = session.lane
    assert lane is not None
    post, sent = lane._exchange, []

    def counting(count: int, receive: Any, send: Any) -> Any:
        sent.extend(tensor.nbytes for tensor, _, _ in send)
        return post(count, receive, send)

    lane._exchange = counting  # type: ignore[method-assign]
    step_of(model, optimizer, 1, rank)
    found = zgraph.report(model)
    return sum(sent), found.sent_bytes, str(found)


@pytest.mark.parametrize("stage", [0, 3])
def test_bytes_are_those_that_were_predicted(pool: Pool, stage: int) -> None:
    plain = pool.run(counted, 2, stage, None)
    for codec, less in (("q8(block=256)", 3.9), ("sign(block=256)", 28)):
        for (whole, _, _), (sent, predicted, said) in zip(plain, pool.run(counted, 2, stage, codec), strict=True):
            assert abs(sent - predicted) <= 0.01 * predicted
            assert "relative error of the first codes" in said
            if stage == 0:
                assert sent * less < whole


def with_bad_numbers(mesh: DeviceMesh, stage: int, codec: str) -> tuple[bool, bool, bool]:
    """Whether a gradient that is not finite on one rank is so in all; whether the next one and all rests are finite."""
    model = zgraph.compile(net(), mesh=mesh, stage=stage, compress=codec)
    rank = mesh.get_rank()
    x, y = batch(0, rank)

    def gradients() -> list[torch.Tensor]:
        found = [p.grad for p in model.parameters()]
        return [g.to_local() if hasattr(g, "to_local") else g for g in found if g is not None]

    (model(x) - y).square().mean().backward()
    model.zero_grad()
    (model(x * (float("inf") if rank == 1 else 1)) - y).square().mean().backward()
    total = torch.stack([g.isfinite().all() for g in gradients()]).all()
    is_bad = not bool(total)
    model.zero_grad()
    (model(x) - y).square().mean().backward()
    feedback = compiled_model(model).session.feedback
    rests = all(bool(flat.isfinite().all()) for flat in feedback._flats.values())
    return is_bad, all(bool(g.isfinite().all()) for g in gradients()), rests


@pytest.mark.parametrize("codec", [CODECS[0], CODECS[3], deep(CODECS[1]), deep(CODECS[2])])
def test_what_is_not_finite_is_told_and_not_kept(pool: Pool, codec: str) -> None:
    for is_bad, is_good, rests in pool.run(with_bad_numbers, 2, 2, codec):
        assert is_bad
        assert is_good
        assert rests


def resumed(mesh: DeviceMesh, stage: int, codec: str) -> tuple[list[float], list[float]]:
    """Losses behind a saved state: of the run that goes on, and of one that loads it."""
    runs = []
    rank = mesh.get_rank()
    model = zgraph.compile(net(), mesh=mesh, stage=stage, compress=codec)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(6):
        step_of(model, optimizer, step, rank)
    saved = {k: v.clone() for k, v in zgraph.feedback(model).state_dict().items()}
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    assert any(bool((v.to_local() if hasattr(v, "to_local") else v).any()) for v in saved.values())
    runs.append([step_of(model, optimizer, step, rank) for step in range(6, 12)])
    model = zgraph.compile(net(), mesh=mesh, stage=stage, compress=codec)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.load_state_dict(state)
    zgraph.feedback(model).load_state_dict(saved)
    runs.append([step_of(model, optimizer, step, rank) for step in range(6, 12)])
    return runs[0], runs[1]


@pytest.mark.parametrize(("stage", "codec"), [(0, CODECS[1]), (3, CODECS[2]), deep(1, CODECS[3])])
def test_a_resumed_run_is_the_uninterrupted_one(pool: Pool, stage: int, codec: str) -> None:
    for went_on, again in pool.run(resumed, 2, stage, codec):
        assert went_on == again


class Odd(nn.Module):
    """Tied and frozen parameters, and some smaller than a block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 24, bias=False)
        self.second.weight = self.first.weight
        self.scale, self.last = nn.Parameter(torch.ones(3)), nn.Linear(24, 3)
        self.last.weight.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.second(self.first(x).tanh())) * self.scale


def scaled_on_one_rank(mesh: DeviceMesh, stage: int, codec: str) -> list[list[torch.Tensor]]:
    """Gradients where those of the second rank are multiplied by zero, and so on, each in a step of its own; whole."""
    model, rank = zgraph.compile(Odd(), mesh=mesh, stage=stage, compress=codec), mesh.get_rank()
    found = []
    for scale in SCALES:
        x, _ = batch(0, 0)
        (model(x).square().mean() * (scale if rank == 1 else 1)).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for g in gradients])
        model.zero_grad()
    return found


SCALES = [0.0, 1e-40, float("inf"), float("nan"), 1.0]


@pytest.mark.parametrize(
    ("stage", "codec"),
    [(2, "q8(block=256)"), *(deep(stage, codec) for stage in (0, 3) for codec in CODECS), deep(2, "sign(block=64)")],
)
def test_gradients_that_vanish_or_overflow_on_one_rank(pool: Pool, stage: int, codec: str) -> None:
    model, (x, _) = Odd(), batch(0, 0)
    model(x).square().mean().backward()
    wanted = [p.grad for p in model.parameters() if p.grad is not None]
    for by_scale in pool.run(scaled_on_one_rank, 2, stage, codec):
        for scale, gradients in zip(SCALES, by_scale, strict=True):
            assert len(gradients) == len(wanted)
            is_finite = all(bool(g.isfinite().all()) for g in gradients)
            assert is_finite == (scale in (0.0, 1e-40, 1.0)), "and so the step is skipped on all ranks"
        if codec.startswith("q8"):
            largest = max(float(due.abs().max()) for due in wanted)  # blocks reach over members of a bucket
            for step, share in ((0, 0.5), (1, 0.5), (4, 1.0)):
                for made, due in zip(by_scale[step], wanted, strict=True):
                    assert (made - share * due).abs().max() < 0.03 * largest
