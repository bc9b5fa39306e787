"""Habits around the loop: clipping, schedules, checkpointing, random numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from benchmarks.habit.nets import HIDDEN, WIDTH, Classifier, Net, rows
from benchmarks.habit.side import Side, numbered, sgd, trained, values, whole
from benchmarks.habit.table import Found, Table
from benchmarks.habit.training import training

TABLE = Table("around the loop")
habit = TABLE.habit


@habit("`clip_grad_norm_`, and its norm logged")
def clipped_norm(side: Side) -> Found:
    model, norms = side.model(Classifier), []
    found = training(side, model, before=lambda: norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.3)))
    return {**found, "norms": torch.stack([whole(n) for n in norms])}


@habit("`float(clip_grad_norm_(...))`, with the infinity norm")
def clipped_infinity_norm(side: Side) -> Found:
    model, norms = side.model(Classifier), []

    def clip() -> None:
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.05, norm_type=float("inf"))))

    return {**training(side, model, before=clip), "norms": torch.tensor(norms)}


@habit("`clip_grad_value_`")
def clipped_values(side: Side) -> Found:
    model = side.model(Classifier)
    return training(side, model, before=lambda: nn.utils.clip_grad_value_(model.parameters(), 0.01))


@habit("a norm by hand: `sum(p.grad.norm() ** 2) ** 0.5`, and gradients multiplied by a number")
def norm_by_hand(side: Side) -> Found:
    model = side.model(Classifier)

    def clip() -> None:
        total = sum(p.grad.norm() ** 2 for p in model.parameters()) ** 0.5
        for parameter in model.parameters():
            parameter.grad.mul_(min(1.0, 0.3 / (float(total) + 1e-6)))

    return training(side, model, before=clip)


@habit("clipping each parameter by its own norm")
def clipped_one_by_one(side: Side) -> Found:
    model = side.model(Classifier)

    def clip() -> None:
        for parameter in model.parameters():
            nn.utils.clip_grad_norm_(parameter, 0.05)

    return training(side, model, before=clip)


@habit("centred gradients: `p.grad -= p.grad.mean(1, keepdim=True)`")
def centred_gradients(side: Side) -> Found:
    model = side.model(Classifier)

    def centre() -> None:
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.grad -= parameter.grad.mean(1, keepdim=True)

    return training(side, model, before=centre)


@habit("a new gradient assigned: `p.grad = p.grad * 0.5`")
def assigned_gradients(side: Side) -> Found:
    model = side.model(Classifier)

    def halve() -> None:
        for parameter in model.parameters():
            parameter.grad = parameter.grad * 0.5

    return training(side, model, before=halve)


@habit("`ReduceLROnPlateau` on the mean loss")
def plateau(side: Side) -> Found:
    model = side.model(Classifier)
    optimizer = sgd(model)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
    losses = []
    for step in range(4):
        loss = model(*rows(side.seed(step)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step(side.mean(loss))
        losses += [loss.detach(), optimizer.param_groups[0]["lr"]]
    return {**numbered(losses), **values(model)}


@habit("`SequentialLR` of a warm-up and a cosine")
def warm_up(side: Side) -> Found:
    model = side.model(Classifier)
    optimizer, schedules = sgd(model), torch.optim.lr_scheduler
    parts = [schedules.LinearLR(optimizer, 0.1, total_iters=2), schedules.CosineAnnealingLR(optimizer, 4)]
    schedule = schedules.SequentialLR(optimizer, parts, [2])
    found = []
    for step in range(5):
        loss = model(*rows(side.seed(step)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        found.append(loss.detach())
    return {**numbered(found), **values(model)}


@habit("groups by name: no weight decay on biases and norms, another rate for the head")
def groups_by_name(side: Side) -> Found:
    model = side.model(Classifier)
    plain = [p for n, p in model.named_parameters() if n.endswith("bias") or "norm" in n]
    decayed = [p for n, p in model.named_parameters() if n == "first.weight"]
    optimizer = torch.optim.AdamW(
        [{"params": plain, "weight_decay": 0.0}, {"params": decayed}, {"params": [model.last.weight], "lr": 0.05}],
        lr=1e-2,
        weight_decay=0.1,
    )
    return training(side, model, optimizer=optimizer)


@habit("named parameters given to the optimizer: `AdamW(model.named_parameters())`")
def named_parameters(side: Side) -> Found:
    model = side.model(Classifier)
    return training(side, model, optimizer=torch.optim.AdamW(model.named_parameters(), lr=1e-2))


@habit("a closure given to `optimizer.step`")
def closure(side: Side) -> Found:
    model = side.model(Classifier)
    optimizer, losses = sgd(model), []
    for step in range(3):
        batch = rows(side.seed(step))

        def evaluate(batch: tuple[Tensor, Tensor] = batch) -> Tensor:
            optimizer.zero_grad()
            loss = model(*batch)
            loss.backward()
            return loss

        losses.append(optimizer.step(evaluate).detach())
    return {**numbered(losses), **values(model)}


@habit("`torch.utils.checkpoint` around a layer")
def checkpointing(side: Side) -> Found:
    class Checked(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(checkpoint(lambda v: self.norm(self.first(v)), x, use_reentrant=False))

    model = side.model(Checked)

    def loss(step: int) -> Tensor:
        x, y = rows(side.seed(step))
        return F.cross_entropy(model(x), y)

    return trained(side, model, loss)


@habit("`gradient_checkpointing_enable` of transformers, after the model is compiled", ranks=(1, 2))
def checkpointing_of_transformers(side: Side) -> Found:
    from benchmarks.habit.nets import tiny_llama, words

    model = side.model(tiny_llama)
    model.gradient_checkpointing_enable()
    return trained(side, model, lambda step: model(input_ids=(ids := words(side.seed(step))), labels=ids).loss)


@habit("dropout whose seed is set in each step")
def seeded_dropout(side: Side) -> Found:
    model = side.model(lambda: nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Dropout(0.5), nn.Linear(HIDDEN, 1)))

    def loss(step: int) -> Tensor:
        torch.manual_seed(side.seed(step))
        return model(rows(side.seed(step))[0]).square().mean()

    return trained(side, model, loss)


@habit("`DataLoader` with a `DistributedSampler` and `set_epoch`")
def sampler(side: Side) -> Found:
    model = side.model(Classifier)
    data = TensorDataset(*rows(0, 24))
    part = DistributedSampler(data, side.num_ranks, side.rank, seed=1)
    loader = DataLoader(data, batch_size=4, sampler=part)
    optimizer, losses = sgd(model), []
    for epoch in range(2):
        part.set_epoch(epoch)
        for x, y in loader:
            loss = model(x, y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    return {**numbered(losses), **values(model)}


@habit("noise added to the gradients")
def gradient_noise(side: Side) -> Found:
    model = side.model(Classifier)

    def add() -> None:
        for parameter in model.parameters():
            parameter.grad.add_(torch.full_like(parameter.grad, 0.01))

    return training(side, model, before=add)


@habit("loss scaled by hand, gradients divided before the step")
def scaled_by_hand(side: Side) -> Found:
    model = side.model(Classifier)

    def unscale() -> None:
        for parameter in model.parameters():
            parameter.grad /= 64.0

    return trained(side, model, lambda step: 64.0 * model(*rows(side.seed(step))), before=unscale)
