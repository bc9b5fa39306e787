"""Losses of a rank whose peers are echoes of it, from plain eager training on the processor."""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call

from tests.emulated.case import Case
from tests.emulated.nets import batch, build


def losses(case: Case) -> list[float]:
    """The loss of each call."""
    model = build(case.net)
    parts = case.num_shards if case.options.get("stage", 3) != 0 else 1
    dtype = torch.bfloat16 if case.options.get("param_dtype") else None
    whole = {name: p.detach() for name, p in model.named_parameters()}
    held = {
        name: nn.Parameter(
            p.detach()[: -(-p.shape[0] // parts)].clone() if p.dim() else p.detach().clone(), p.requires_grad
        )
        for name, p in model.named_parameters()
    }
    optimizer = torch.optim.AdamW([p for p in held.values() if p.requires_grad], lr=case.rate)
    found = []
    for step in range(case.num_steps):
        for micro in range(case.num_micro_steps):
            used = {name: _computed(p, parts, whole[name].shape, dtype) for name, p in held.items()}
            inputs = batch(case.net, model, case.seed(step, micro), case.num_rows)
            if dtype is not None:
                inputs = tuple(t.to(dtype) if t.is_floating_point() else t for t in inputs)
            loss = functional_call(model, used, inputs)
            loss.backward()
            found.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return found


def _chunk(whole: torch.Tensor, parts: int) -> torch.Tensor:
    """The rows of the first rank."""
    return (whole[: -(-whole.shape[0] // parts)] if whole.dim() else whole).clone()


def _computed(chunk: nn.Parameter, parts: int, shape: torch.Size, dtype: torch.dtype | None) -> torch.Tensor:
    """The whole of a parameter: this rank's chunk, and its echoes, which no gradient comes from."""
    whole = torch.cat([chunk, *[chunk.detach()] * (parts - 1)])[: shape[0]] if chunk.dim() else chunk
    return whole.to(dtype) if dtype is not None else whole
