"""Parameters that the loop itself changes."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.habit.nets import (
    Classifier,
    rows,
)
from benchmarks.habit.side import Side, numbered, sgd, values, whole
from benchmarks.habit.table import Found, Table
from benchmarks.habit.training import training

TABLE = Table("updates by hand")
habit = TABLE.habit


@habit("SAM: a second forward and backward at parameters that are moved, in place, along the gradient")
def sam(side: Side) -> Found:
    model = side.model(Classifier)
    optimizer = sgd(model)
    losses = []
    for step in range(3):
        batch = rows(side.seed(step))
        loss = model(*batch)
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        moved = [p.grad * (0.05 / (whole(norm) + 1e-12)) for p in model.parameters()]
        with torch.no_grad():
            for parameter, step_of in zip(model.parameters(), moved, strict=True):
                parameter.add_(step_of)
        optimizer.zero_grad()
        model(*batch).backward()
        with torch.no_grad():
            for parameter, step_of in zip(model.parameters(), moved, strict=True):
                parameter.sub_(step_of)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return {**numbered(losses), **values(model)}


@habit("Lookahead: slow weights, kept as clones, towards which the fast ones are pulled")
def lookahead(side: Side) -> Found:
    model = side.model(Classifier)
    slow = [p.detach().clone() for p in model.parameters()]
    found = dict(training(side, model))
    with torch.no_grad():
        for parameter, kept in zip(model.parameters(), slow, strict=True):
            kept.lerp_(parameter, 0.5)
            parameter.copy_(kept)
    return {**found, **{f"slow {n}": v for n, v in values(model).items()}}


@habit("an update by hand: `p -= lr * p.grad` under `no_grad`")
def update_by_hand(side: Side) -> Found:
    model = side.model(Classifier)
    losses = []
    for step in range(3):
        loss = model(*rows(side.seed(step)))
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        model.zero_grad()
        losses.append(loss.detach())
    return {**numbered(losses), **values(model)}


@habit("an update by hand through `.data`: `p.data.add_(p.grad, alpha=-lr)`")
def update_of_data(side: Side) -> Found:
    model = side.model(Classifier)
    losses = []
    for step in range(3):
        loss = model(*rows(side.seed(step)))
        loss.backward()
        for parameter in model.parameters():
            parameter.data.add_(parameter.grad, alpha=-0.1)
            parameter.grad.data.zero_()
        losses.append(loss.detach())
    return {**numbered(losses), **values(model)}


@habit("weights clipped in place, as of a Wasserstein GAN: `p.data.clamp_(-c, c)`")
def clipped_weights(side: Side) -> Found:
    model = side.model(Classifier)

    def clip() -> None:
        for parameter in model.parameters():
            parameter.data.clamp_(-0.1, 0.1)

    return training(side, model, before=clip)


@habit("layers given new values in the middle: `nn.init.xavier_uniform_(layer.weight)`")
def reset_layer(side: Side) -> Found:
    model = side.model(Classifier)
    found = dict(training(side, model))
    torch.manual_seed(3)
    nn.init.constant_(model.last.weight, 0.1)
    nn.init.zeros_(model.last.bias)
    return {**{f"before {n}": v for n, v in found.items()}, **training(side, model)}
