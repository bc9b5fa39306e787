"""Losses of policies and preferences."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.habit.nets import (
    Language,
    Net,
    features,
    next_word,
    rows,
    words,
)
from benchmarks.habit.side import Side, trained
from benchmarks.habit.table import Found, Table

TABLE = Table("policies")
habit = TABLE.habit


@habit("a policy gradient: actions drawn from the model's own distribution")
def policy_gradient(side: Side) -> Found:
    model = side.model(Net)

    def loss(step: int) -> Tensor:
        torch.manual_seed(side.seed(step))
        policy = torch.distributions.Categorical(logits=model(features(side.seed(step))))
        actions = policy.sample()
        return -(policy.log_prob(actions) * actions.float().sub(2)).mean() - 0.01 * policy.entropy().mean()

    return trained(side, model, loss)


@habit("PPO: old probabilities without gradient, some epochs over them, a ratio that is clipped")
def ppo(side: Side) -> Found:
    model = side.model(Net)
    x, y = rows(side.seed(0))
    with torch.no_grad():
        old = model(x).log_softmax(-1).gather(1, y[:, None])

    def loss(_step: int) -> Tensor:
        ratio = (model(x).log_softmax(-1).gather(1, y[:, None]) - old).exp()
        good = x.mean(-1, keepdim=True)
        return -torch.minimum(ratio * good, ratio.clamp(0.8, 1.2) * good).mean()

    return trained(side, model, loss)


@habit("DPO: a frozen reference model, and chosen and rejected rows")
def dpo(side: Side) -> Found:
    model = side.model(Language)
    reference = side.model(lambda: Language().requires_grad_(False)).eval()

    def logs(of: nn.Module, ids: Tensor) -> Tensor:
        return of(ids)[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).sum((1, 2))

    def loss(step: int) -> Tensor:
        chosen, rejected = words(side.seed(2 * step)), words(side.seed(2 * step + 1))
        with torch.no_grad():
            before = logs(reference, chosen) - logs(reference, rejected)
        return -F.logsigmoid(0.5 * (logs(model, chosen) - logs(model, rejected) - before)).mean()

    return trained(side, model, loss)


@habit("DPO with a `deepcopy` of the compiled model as reference")
def dpo_with_a_copy(side: Side) -> Found:
    model = side.model(Language)
    reference = copy.deepcopy(model).requires_grad_(False).eval()

    def loss(step: int) -> Tensor:
        ids = words(side.seed(step))
        with torch.no_grad():
            before = reference(ids).log_softmax(-1)
        return F.kl_div(model(ids).log_softmax(-1), before, log_target=True) + next_word(model(ids), ids)

    return trained(side, model, loss)
