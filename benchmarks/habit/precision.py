"""Precision: loss scales, autocast, bf16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.habit.nets import (
    Net,
    rows,
)
from benchmarks.habit.side import Side, numbered, sgd, trained, values
from benchmarks.habit.table import Found, Table

TABLE = Table("precision")
habit = TABLE.habit


def _scaled(side: Side, *, unscales: bool, bad: int = -1, dtype: torch.dtype = torch.float32) -> Found:
    model = side.model(Net)
    optimizer = sgd(model, 0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
    losses, scales = [], []
    for step in range(5):
        x, y = rows(side.seed(step))
        if step == bad and side.rank == side.num_ranks - 1:
            x = x * float("inf")
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        if unscales:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.detach())
        scales.append(scaler.get_scale())
    return {**numbered(losses), "scales": torch.tensor(scales), **values(model)}


@habit("`torch.amp.GradScaler`")
def grad_scaler(side: Side) -> Found:
    return _scaled(side, unscales=False)


@habit("`GradScaler` with `unscale_` and clipping")
def grad_scaler_and_clipping(side: Side) -> Found:
    return _scaled(side, unscales=True)


@habit("`GradScaler` where one rank overflows: all leave the step out")
def grad_scaler_overflow(side: Side) -> Found:
    return _scaled(side, unscales=True, bad=2)


@habit("`torch.autocast` to bf16 around the forward", tolerance=2e-2)
def autocast(side: Side) -> Found:
    model = side.model(Net)

    def loss(step: int) -> Tensor:
        x, y = rows(side.seed(step))
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(x).float(), y)

    return trained(side, model, loss)


@habit("`autocast` around the model alone, the loss in fp32", tolerance=2e-2)
def autocast_of_the_model(side: Side) -> Found:
    model = side.model(Net)

    def loss(step: int) -> Tensor:
        x, y = rows(side.seed(step))
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        return F.cross_entropy(out.float(), y)

    return trained(side, model, loss)


class InBf16(nn.Module):
    """A model of which a copy in bf16 computes: eagerly what `param_dtype` does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, x: Tensor) -> Tensor:
        lower = {n: p.to(torch.bfloat16) for n, p in self.inner.named_parameters()}
        return torch.func.functional_call(self.inner, lower, x.to(torch.bfloat16))


def _in_bf16(side: Side, **options: Any) -> Found:
    model = side.model(Net, param_dtype=torch.bfloat16, **options)
    run = model if side.is_zgraph else InBf16(model)

    def loss(step: int) -> Tensor:
        x, y = rows(side.seed(step))
        return F.cross_entropy(run(x).float(), y)

    return trained(side, model, loss)


@habit("bf16 to compute in, masters in fp32", tolerance=2e-2)
def bf16_compute(side: Side) -> Found:
    return _in_bf16(side)


@habit("bf16 to compute in, gradients reduced in fp32", tolerance=2e-2)
def bf16_compute_fp32_reduce(side: Side) -> Found:
    return _in_bf16(side, reduce_dtype=torch.float32)


@habit("a model that is bf16 throughout: `model.bfloat16()` before it is compiled", tolerance=5e-2)
def all_bf16(side: Side) -> Found:
    model = side.model(lambda: Net().bfloat16())

    def loss(step: int) -> Tensor:
        x, y = rows(side.seed(step))
        return F.cross_entropy(model(x.bfloat16()).float(), y)

    return trained(side, model, loss)
