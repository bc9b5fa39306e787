"""Training on several ranks with data of their own, and the same on one by plain eager torch."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call

import zgraph
from tests.emulated import cuda
from tests.emulated.case import Case
from tests.emulated.nets import batch, build
from tests.emulated.races import races
from tests.emulated.training import optimizer_of, options_of


def train(case: Case) -> tuple[list[float], list[str]]:
    """The losses of this rank, and the races in its log."""
    torch.compiler.reset()
    rank = dist.get_rank()
    model = build(case.net).to("cuda")
    compiled = zgraph.compile(model, **options_of(case))
    optimizer = optimizer_of(case, compiled)
    losses = []
    with cuda.recorded() as log:
        for step in range(case.num_steps):
            for micro in range(case.num_micro_steps):
                inputs = [t.to("cuda") for t in _batch(case, model, step, micro, rank)]
                is_last = micro + 1 == case.num_micro_steps
                with nullcontext() if is_last else zgraph.no_sync(compiled):
                    loss = compiled(*inputs)
                    loss.backward()
                    losses.append(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
    return [float(loss) for loss in losses], [str(race) for race in races(log)]


def plain(case: Case, num_ranks: int) -> list[list[float]]:
    """The losses of each rank, from one process."""
    model = build(case.net)
    optimizer = torch.optim.AdamW(model.parameters(), lr=case.rate)
    losses: list[list[float]] = [[] for _ in range(num_ranks)]
    for step in range(case.num_steps):
        for micro in range(case.num_micro_steps):
            for rank in range(num_ranks):
                loss = _loss(case, model, _batch(case, model, step, micro, rank))
                (loss / num_ranks).backward()
                losses[rank].append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def _batch(case: Case, model: Any, step: int, micro: int, rank: int) -> tuple[torch.Tensor, ...]:
    return batch(case.net, model, case.seed(step, micro) + 7 * rank, case.num_rows)


def _loss(case: Case, model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    if case.is_exact:
        found: torch.Tensor = model(*inputs)
        return found
    lower = {name: p.bfloat16() for name, p in model.named_parameters()}
    return functional_call(model, lower, tuple(t.bfloat16() if t.is_floating_point() else t for t in inputs))
