"""The layers whose rounding costs the most: how much each moves the loss of a text, to second order.

Where a layer's weight changes by `D`, the loss changes by `g . D x` to first order, for its inputs `x` of a token and
the gradient `g` of the loss by its outputs. With labels that are drawn from the model's own distribution the mean of
this is 0, and half of the mean of its square is what the distribution moves by: the divergence from the plain model, in
nats a token (the Fisher information, as in Kim et al., "SqueezeLLM", 2024). What one token does to the outputs of a
layer is taken to be independent of what others do. One backward gives it for all layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from zgraph.errors import UsageError
from zgraph.inference.layers import linear_layers

ROWS = 4
"""Rows of the text that are looked at."""


def divergences(model: nn.Module, changes: Mapping[str, torch.Tensor], tokens: torch.Tensor) -> dict[str, float]:
    """How far the model's distribution moves where one weight alone changes, in nats a token, by the weight's name.

    Args:
        model: a causal language model, in eval mode. Neither it nor its gradients are changed.
        changes: of weights, [outputs, columns], by their names.
        tokens: int64 [rows, tokens].

    Raises:
        UsageError: the model does not give logits by tokens.
    """
    names = {id(p): n for n, p in model.named_parameters()}
    found: dict[str, float] = dict.fromkeys(changes, 0.0)
    dice, count = torch.Generator(tokens.device).manual_seed(0), 0

    def watch(name: str) -> Any:
        def forward(_: nn.Module, given: Any, made: torch.Tensor) -> None:
            moved = given[0].detach().float() @ changes[name].t()

            def backward(gradient: torch.Tensor) -> None:
                found[name] += (gradient.float() * moved).sum(-1).square().sum().item() / 2

            made.register_hook(backward)  # type: ignore[no-untyped-call]

        return forward

    layers = [(names[id(layer.weight)], layer) for layer in linear_layers(model).values()]
    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers if name in changes]
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    try:
        with torch.enable_grad():
            for row in tokens[:ROWS]:
                rows = table(row[None]).detach().requires_grad_()
                made = model(inputs_embeds=rows, use_cache=False).logits[0].float()
                labels = torch.multinomial(made.detach().softmax(-1), 1, generator=dice)[:, 0]
                torch.autograd.grad(F.cross_entropy(made, labels, reduction="sum"), rows)
                count += len(row)
    except (AttributeError, TypeError) as error:
        raise UsageError(
            f"{type(model).__name__} gives no logits by embeddings ({error}), by which layers are chosen; leave wider= "
            "out"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / count for name, total in found.items()}


def costliest(costs: Mapping[str, float], sizes: Mapping[str, int], share: float) -> list[str]:
    """The names that cost most for their size, of so much of all sizes together at most.

    Args:
        costs, sizes: by name.
        share: from 0 to 1.
    """
    left, found = share * sum(sizes.values()), list[str]()
    for name in sorted(costs, key=lambda name: (-costs[name] / sizes[name], name)):
        if sizes[name] <= left:
            found.append(name)
            left -= sizes[name]
    return found
