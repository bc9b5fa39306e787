"""Models whose logits are one projection of their last hidden state, without which they must be made whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zgraph.errors import UsageError

TOLERANCE = 1e-3
_NUM_TOKENS = 4
_WHOLE = 'Pass logits="whole" to make all logits instead, which takes their memory'


def check_projection(model: nn.Module, who: str) -> None:
    """Check that a model's logits are its output embedding's product with its last hidden state.

    A soft-capping or a scale of logits, a bias, or a loss of routers beside them would else be lost without a word.

    Raises:
        UsageError: they are not, or that cannot be found out.
    """
    if not hasattr(model, "get_output_embeddings") or not hasattr(model, "base_model"):
        raise UsageError(f"the {who}, {type(model).__name__}, has no base_model and get_output_embeddings(). {_WHOLE}")
    head = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Linear) or head.bias is not None or model.base_model is model:
        raise UsageError(f"the logits of the {who}, {type(model).__name__}, are no product alone. {_WHOLE}")
    if getattr(getattr(model, "config", None), "output_router_logits", False):
        raise UsageError(f"the {who}, {type(model).__name__}, has a loss of its routers as well. {_WHOLE}")
    if any(p.is_meta for p in model.parameters()):
        raise UsageError(f"the {who}, {type(model).__name__}, is on the meta device: load its weights first. {_WHOLE}")
    tokens = torch.arange(_NUM_TOKENS, device=head.weight.device)[None] % len(head.weight)
    before = model.training
    model.eval()
    try:
        with torch.no_grad():
            wanted = model(input_ids=tokens).logits
            made = head(last_hidden(model, {"input_ids": tokens}))
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"the {who}, {type(model).__name__}, takes no input_ids alone ({error}). {_WHOLE}") from None
    finally:
        model.train(before)
    difference = (made - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)
    if not difference <= TOLERANCE:
        raise UsageError(
            f"the logits of the {who}, {type(model).__name__}, are more than its output embedding's product with its "
            f"last hidden state: they differ by {float(difference):.1g} of the largest (a soft-capping or a scale of "
            f"logits?). {_WHOLE}"
        )


def last_hidden(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """The last hidden state of a model, [..., D]."""
    base: Any = model.base_model
    hidden: torch.Tensor = base(**inputs).last_hidden_state
    return hidden


def output_weight(model: nn.Module) -> torch.Tensor:
    """The weight that makes the logits, [V, D]."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    weight: torch.Tensor = head.weight
    return weight
