"""Habits within a forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.habit.nets import (
    CLASSES,
    WIDTH,
    Classifier,
    Conv,
    Net,
    features,
    images,
)
from benchmarks.habit.side import Side, trained
from benchmarks.habit.table import Found, Table
from benchmarks.habit.training import outside, training

TABLE = Table("forwards")
habit = TABLE.habit


@habit("recurrent layers: `nn.GRU` and `nn.LSTM`")
def recurrent(side: Side) -> Found:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.lstm = nn.GRU(WIDTH, 9, batch_first=True), nn.LSTM(9, 7, batch_first=True)
            self.last = nn.Linear(7, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.lstm(self.gru(x)[0])[0][:, -1])

    model = side.model(Recurrent)

    def loss(step: int) -> Tensor:
        return model(torch.stack([features(side.seed(step)), features(side.seed(step) + 50)])).square().mean()

    return trained(side, model, loss)


@habit("BatchNorm, with its running statistics")
def batch_norm(side: Side) -> Found:
    model = side.model(Conv)

    def loss(step: int) -> Tensor:
        image, y = images(side.seed(step))
        return F.cross_entropy(model(image), y)

    return {**trained(side, model, loss), "mean": side.first(model.norm.running_mean)}


@habit("a stack of layers run in a loop, some of them left out at random (LayerDrop), alike on all ranks")
def layer_drop(side: Side) -> Found:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
            self.kept = (0, 1, 2)

        def forward(self, x: Tensor) -> Tensor:
            for index in self.kept:
                x = torch.tanh(self.layers[index](x))
            return x.square().mean()

    model = side.model(Dropping)

    def loss(step: int) -> Tensor:
        model.kept = ((0, 2), (0, 1, 2), (1,))[step]
        return model(features(side.seed(step)))

    return trained(side, model, loss)


@habit("a layer that is used twice in a forward")
def shared_layer(side: Side) -> Found:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(x))).square().mean()

    model = side.model(Twice)
    return trained(side, model, lambda step: model(features(side.seed(step))))


@habit("a parameter that no forward uses")
def unused_parameter(side: Side) -> Found:
    class Spare(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Parameter(torch.ones(3))

    return training(side, side.model(Spare))


@habit("parameters in a `ParameterList` and a `ParameterDict`")
def parameter_lists(side: Side) -> Found:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.many = nn.ParameterList([torch.randn(WIDTH, WIDTH) for _ in range(2)])
            self.named = nn.ParameterDict({"scale": torch.ones(WIDTH), "shift": torch.zeros(())})

        def forward(self, x: Tensor) -> Tensor:
            for weight in self.many:
                x = torch.tanh(x @ weight)
            return (x * self.named["scale"] + self.named["shift"]).square().mean()

    model = side.model(Listed)
    return trained(side, model, lambda step: model(features(side.seed(step))))


@habit("a step counter in a buffer or an attribute")
def counter(side: Side) -> Found:
    class Counting(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            self.steps += 1
            return super().forward(x, y) / self.steps

    model = side.model(Counting)
    return {**training(side, model), "steps": model.steps.clone()}


@habit("`if` on the value of a tensor in the forward")
def branch(side: Side) -> Found:
    class Branching(Net):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            if hidden.mean() > -100:
                hidden = hidden * 2
            return self.last(self.norm(hidden))

    return outside(side, side.model(Branching))


@habit("`print` and `.item()` in the forward")
def item_in_forward(side: Side) -> Found:
    class Saying(Net):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            print(hidden.mean().item())
            return self.last(self.norm(hidden))

    return outside(side, side.model(Saying))


@habit("a parameter changed in place in the forward: `self.weight.data.clamp_(...)`")
def changed_in_forward(side: Side) -> Found:
    class Clamping(Net):
        def forward(self, x: Tensor) -> Tensor:
            self.last.weight.data.clamp_(-0.05, 0.05)
            return super().forward(x)

    return outside(side, side.model(Clamping))


@habit("an `autograd.Function` of one's own (a straight-through estimator)")
def own_function(side: Side) -> Found:
    class Rounded(torch.autograd.Function):
        @staticmethod
        def forward(_ctx: Any, x: Tensor) -> Tensor:
            return x.round()

        @staticmethod
        def backward(_ctx: Any, gradient: Tensor) -> Tensor:
            return gradient

    class Rounding(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(Rounded.apply(3 * self.norm(self.first(x))) / 3)

    return outside(side, side.model(Rounding))
