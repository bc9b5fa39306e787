"""Inputs that a model's layers are given by a text: which of their columns have outliers, and weights rounded to suit.

Few columns of a transformer's activations are far larger than the rest, and the same ones for whatever tokens (Dettmers
et al., "LLM.int8()", 2022; Xiao et al., "SmoothQuant", 2023). One scale for a token's activations then leaves few of
the steps of int8 to all others. These columns are multiplied apart from the rest, with more of their digits.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from zgraph.codegen import quantised
from zgraph.codegen.gptq import gptq
from zgraph.errors import QuantisationError, UsageError, ZgraphError
from zgraph.inference.layers import check_group, kept_in, linear_layers, rows_of, watched
from zgraph.inference.sensitivity import costliest, divergences

OUTLIERS = 16
"""Columns of each layer's activations that are kept."""

NUM_TOKENS = 256
"""Tokens that a model is called with where there is no text: drawn evenly from its vocabulary."""

Calibrate = torch.Tensor | Mapping[str, torch.Tensor] | None
"""Inputs that a model is called with to see its activations: tokens, [tokens] or [rows, tokens]; or all, by name."""


@torch.no_grad()
def outlier_columns(
    model: nn.Module, calibrate: Calibrate = None, num_columns: int = OUTLIERS
) -> dict[str, torch.Tensor]:
    """The columns of each linear layer's inputs that have the largest magnitudes, in ascending order.

    Args:
        model: is called once, in eval mode. Its mode is put back.
        calibrate: what with; None takes tokens drawn from its vocabulary.
        num_columns: how many. Layers with no more than that have none.

    Returns:
        int64 [num_columns] by the name of the layer's weight in the model.

    Raises:
        UsageError: the inputs mean nothing, or the model takes no tokens and there are none.
    """
    largest: dict[str, torch.Tensor] = {}
    names = {id(p): n for n, p in model.named_parameters()}

    def see(_: str, layer: Any, x: torch.Tensor) -> None:
        if not len(x):
            return
        found, name = x.float().abs().amax(0), names[id(layer.weight)]
        largest[name] = torch.maximum(largest[name], found) if name in largest else found

    call(model, calibrate, see)
    return {
        name: found.topk(num_columns).indices.sort().values
        for name, found in largest.items()
        if len(found) > num_columns
    }


@torch.no_grad()
def rounded_integers(
    model: nn.Module, calibrate: torch.Tensor | Mapping[str, torch.Tensor], group: int, wider: float = 0.0
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The int4 of each linear layer by GPTQ, when the text reaches it: each makes up for the errors of those before it.

    Args:
        model: is called once, in eval mode, and not changed.
        calibrate: what with.
        group: columns that share a scale.
        wider: share of these weights that stay in int8: those that cost most, as `zgraph.inference.sensitivity` has it.

    Returns:
        Integers, two in a byte, uint8 [outputs, columns / 2], and scales, bf16 [columns / group, outputs, 2], by the
        name of the layer's weight in the model. Layers that int4 leaves in int8 have none.

    Raises:
        QuantisationError: a layer's columns or outputs do not fit the integers, or its inputs are not finite.
        UsageError: the inputs mean nothing.
    """
    kinds, names = kept_in(model, "int4"), {id(p): n for n, p in model.named_parameters()}
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, layer in linear_layers(model).items():
        if kinds[name] == "int4":
            check_group(name, rows_of(layer), group)
    last: tuple[torch.Tensor, torch.Tensor] | None = None

    def see(name: str, layer: Any, x: torch.Tensor) -> torch.Tensor | None:
        nonlocal last
        weight = names[id(layer.weight)]
        if kinds[name] != "int4" or not len(x):
            return None
        wide = x.float()
        if weight not in found:
            if last is None or not torch.equal(last[0], wide):  # layers of one input follow each other
                last = wide, wide.t() @ wide
            if not last[1].isfinite().all():
                raise QuantisationError(
                    f"{name} is given numbers that are infinite or none by calibrate=, or too large for its second "
                    "moments in fp32; pass another text"
                )
            integers, scales = gptq(rows_of(layer), last[1], group)
            found[weight] = quantised.in_pairs(integers), scales
        return wide @ quantised.from_int4(*found[weight], group).t()

    call(model, calibrate, see, makes_logits=False)
    if wider:
        for name in _costliest(model, calibrate, found, group, wider):
            del found[name]
    return found


def _costliest(
    model: nn.Module,
    calibrate: Calibrate,
    integers: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    group: int,
    share: float,
) -> list[str]:
    """The weights that int4 costs most."""
    if isinstance(calibrate, Mapping):
        raise UsageError("wider= looks at the loss of tokens: pass these as calibrate=")
    layers = {
        n: layer for layer in linear_layers(model).values() for n, p in model.named_parameters() if p is layer.weight
    }
    changes = {n: quantised.from_int4(*both, group) - rows_of(layers[n]).float() for n, both in integers.items()}
    was_training = model.training
    model.eval()
    try:
        costs = divergences(model, changes, _inputs(model, calibrate)["input_ids"])
    finally:
        model.train(was_training)
    return costliest(costs, {n: change.numel() for n, change in changes.items()}, share)


def left_wide(model: nn.Module, integers: Collection[str]) -> tuple[str, ...]:
    """The layers that stay in int8 beside those that always do, where only these weights are in int4.

    Args:
        model: whose layers they are.
        integers: names of weights.
    """
    kinds, names = kept_in(model, "int4"), {id(p): n for n, p in model.named_parameters()}
    layers = linear_layers(model)
    return tuple(n for n, kind in kinds.items() if kind == "int4" and names[id(layers[n].weight)] not in integers)


def call(model: nn.Module, calibrate: Calibrate, hook: Any, *, makes_logits: bool = True) -> None:
    """Call a model in eval mode, and have a hook told of what its linear layers are given.

    Args:
        model: whose layers they are.
        calibrate: what it is called with.
        hook: told, as of `zgraph.inference.layers.watched`.
        makes_logits: whether those of all tokens are wanted, which take the most memory.

    Raises:
        UsageError: the model cannot be called so.
    """
    given = _inputs(model, calibrate)
    if not makes_logits and not isinstance(calibrate, Mapping):
        given |= {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    was_training = model.training
    model.eval()
    try:
        with watched(model, hook):
            model(**given)
    except (torch.OutOfMemoryError, ZgraphError):
        raise
    except (TypeError, IndexError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"{type(model).__name__} cannot be called with what calibrate= gives ({type(error).__name__}: {error}); "
            "pass tokens of its vocabulary, or the inputs of its forward by name"
        ) from error
    finally:
        model.train(was_training)


def _inputs(model: nn.Module, calibrate: Calibrate) -> dict[str, Any]:
    """The inputs of a forward by name."""
    if isinstance(calibrate, Mapping):
        if wrong := [name for name, value in calibrate.items() if not isinstance(value, torch.Tensor)]:
            raise UsageError(
                f"calibrate has a {type(calibrate[wrong[0]]).__name__} for {wrong[0]}; pass tensors by name"
            )
        return dict(calibrate)
    takes = inspect.signature(model.forward).parameters.keys()
    table: Any = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None  # type: ignore[operator]
    if "input_ids" not in takes or table is None:
        raise UsageError(
            f"{type(model).__name__} takes no tokens: pass calibrate= with the inputs of its forward by name, to see "
            "its activations"
        )
    num_words: int = table.weight.shape[0]
    tokens = _drawn(model, num_words) if calibrate is None else calibrate
    if not isinstance(tokens, torch.Tensor) or tokens.dim() not in (1, 2) or not tokens.numel():
        raise UsageError("calibrate is a tensor of tokens, [tokens] or [rows, tokens], or tensors by name")
    if tokens.is_floating_point() or int(tokens.min()) < 0 or int(tokens.max()) >= num_words:
        raise UsageError(f"calibrate has tokens outside of 0 to {num_words - 1}, the model's vocabulary")
    rows = tokens.long().to(table.weight.device).view(-1, tokens.shape[-1])
    given: dict[str, Any] = {"input_ids": rows}
    if "decoder_input_ids" in takes:
        given["decoder_input_ids"] = rows
    if "use_cache" in takes:
        given["use_cache"] = False
    return given


def _drawn(model: nn.Module, num_words: int) -> torch.Tensor:
    """Tokens drawn evenly, the same each time, in rows that the model has places for."""
    config: Any = getattr(model, "config", None)
    length = min(getattr(config, "max_position_embeddings", None) or NUM_TOKENS, NUM_TOKENS)
    dice = torch.Generator().manual_seed(0)
    return torch.randint(num_words, (NUM_TOKENS // length, length), generator=dice)


def check_wider(wider: float, weights: str | None, calibrate: Calibrate) -> None:
    """Refuse a share that means nothing. Raises UsageError."""
    if isinstance(wider, bool) or not isinstance(wider, int | float) or not 0 <= wider < 1:
        raise UsageError(f"wider is a share of the weights, from 0 to less than 1, not {wider!r}")
    if wider and (weights != "int4" or calibrate is None):
        raise UsageError('wider= keeps what costs most of weights="int4", as calibrate= shows: pass both')
