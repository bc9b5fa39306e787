"""Models whose logits are one projection of their last hidden state, without which they must be made whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zgraph.errors import UsageError

TOLERANCE = 1e-3
LARGE = 1e3
"""Factor of hidden states in the check: a soft-capping hardly changes small logits."""
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
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Linear) or head.bias is not None or model.base_model is model:
        raise UsageError(f"the logits of the {who}, {type(model).__name__}, are no product alone. {_WHOLE}")
    if getattr(getattr(model, "config", None), "output_router_logits", False):
        raise UsageError(f"the {who}, {type(model).__name__}, has a loss of its routers as well. {_WHOLE}")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UsageError(f"the {who}, {type(model).__name__}, makes its decoder's input of the labels. {_WHOLE}")
    tokens = torch.arange(_NUM_TOKENS, device=head.weight.device)[None] % len(head.weight)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    hook = head.register_forward_pre_hook(lambda _, given: (LARGE * given[0],))
    try:
        with torch.no_grad():
            wanted = model(input_ids=tokens).logits
            made = head(model.base_model(input_ids=tokens).last_hidden_state)
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"the {who}, {type(model).__name__}, takes no input_ids alone ({error}). {_WHOLE}") from None
    finally:
        hook.remove()
        for module, mode in modes.items():
            module.training = mode
    difference = (made - wanted).abs().max() / wanted.abs().max()
    if not difference <= TOLERANCE:  # nor is it where all logits are 0
        raise UsageError(
            f"the logits of the {who}, {type(model).__name__}, are more than its output embedding's product with its "
            f"last hidden state: they differ by {float(difference):.1g} of the largest (a soft-capping or a scale of "
            f"logits, or a head of zeros?). {_WHOLE}"
        )


def output_weight(model: nn.Module) -> torch.Tensor:
    """The weight that makes the logits, [V, D]."""
    weight: torch.Tensor = model.get_output_embeddings().weight  # type: ignore[operator]
    return weight
