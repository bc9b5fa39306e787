"""Losses between layers of a student and of its teacher: hidden states and attention."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from zgraph.errors import UsageError

Pairs = tuple[tuple[int, int], ...]
"""Layers of the student, each with the teacher's."""


def pairs_of(given: object, what: str) -> Pairs:
    """Pairs of layers, as the option called `what` maps them.

    Raises:
        UsageError: it is no mapping.
    """
    if not isinstance(given, Mapping | None):
        raise UsageError(f"{what} must map layers of the student to the teacher's, as {{1: 2}}, not {given!r}")
    return tuple((given or {}).items())


def projections(pairs: Pairs, student: Any, teacher: Any) -> list[nn.Module]:
    """Modules that bring the student's hidden states to the teacher's width, one for each pair.

    Raises:
        UsageError: a model has no such hidden state.
    """
    found: list[nn.Module] = []
    for mine, theirs in pairs:
        for index, model, who in ((mine, student, "student"), (theirs, teacher, "teacher")):
            count = _num_layers(model, who, "hidden")
            if not 0 <= index <= count:
                raise UsageError(f"hidden={{{mine}: {theirs}}}: the {who} has hidden states 0 to {count}")
        widths = student.config.hidden_size, teacher.config.hidden_size
        own = next(student.parameters())
        made = nn.Identity() if widths[0] == widths[1] else nn.Linear(*widths, bias=False)
        found.append(made.to(device=own.device, dtype=own.dtype))
    return found


def check_attentions(pairs: Pairs, student: Any, teacher: Any) -> None:
    """Check that models return the attention probabilities of these layers.

    Raises:
        UsageError: there is no such layer, or a model computes attention without probabilities.
    """
    for mine, theirs in pairs:
        for index, model, who in ((mine, student, "student"), (theirs, teacher, "teacher")):
            count = _num_layers(model, who, "attention")
            if not 0 <= index < count:
                raise UsageError(f"attention={{{mine}: {theirs}}}: the {who} has layers 0 to {count - 1}")
            if (kind := getattr(model.config, "_attn_implementation", "eager")) != "eager":
                raise UsageError(
                    f"attention= reads probabilities, which the {who} does not make with {kind} attention: load it "
                    'with attn_implementation="eager", or call set_attn_implementation("eager") on it'
                )


def hidden_loss(
    pairs: Pairs, brought: Iterable[nn.Module], own: Any, others: Any, mask: torch.Tensor | None
) -> torch.Tensor:
    """The mean squared difference of hidden states, over tokens and pairs, [].

    Args:
        pairs: indices into `hidden_states`.
        brought: what brings the student's to the teacher's width.
        own, others: outputs of both models.
        mask: [B, S], 0 where a token counts for nothing.
    """
    found = []
    for (mine, theirs), projection in zip(pairs, brought, strict=True):
        difference = projection(own.hidden_states[mine]).float() - others.hidden_states[theirs].float()
        found.append(_mean(difference.square().mean(-1), mask))
    return torch.stack(found).mean()


def attention_loss(pairs: Pairs, own: Any, others: Any, mask: torch.Tensor | None) -> torch.Tensor:
    """The squared difference of attention probabilities, summed over keys, the mean over heads, tokens and pairs, [].

    Args:
        pairs: indices into `attentions`, [B, H, S, S].
        own, others: outputs of both models.
        mask: [B, S], 0 where a token counts for nothing.
    """
    found = []
    for mine, theirs in pairs:
        each = [own.attentions[mine].float(), others.attentions[theirs].float()]
        if each[0].shape[1] != each[1].shape[1]:
            each = [probabilities.mean(1, keepdim=True) for probabilities in each]
        found.append(_mean((each[0] - each[1]).square().sum(-1).mean(1), mask))
    return torch.stack(found).mean()


def _mean(each: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return each.mean() if mask is None else (each * mask).sum() / mask.sum()


def _num_layers(model: Any, who: str, what: str) -> int:
    config = getattr(model, "config", None)
    count = getattr(config, "num_hidden_layers", None)
    if count is None or not hasattr(config, "hidden_size") or getattr(config, "is_encoder_decoder", False):
        raise UsageError(f"{what}= needs one stack of layers, with config.num_hidden_layers, of the {who}")
    return int(count)
