"""The cost of keeping weights in integers, on text: perplexity before and after, and the error of each layer."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin

from zgraph.codegen import quantised
from zgraph.errors import UsageError
from zgraph.inference.calibration import Calibrate, check_wider
from zgraph.inference.layers import kept_in, rows_of, watched
from zgraph.inference.model import check_kv, is_calibrated, layers_left_wide, recipe_of, seen_of
from zgraph.inference.programs import Programs
from zgraph.inference.slots import restored, rounded
from zgraph.passes import parse_recipe
from zgraph.passes.analysis.integers import integers_of

WINDOW = 256
"""Tokens that are scored together: each but the first is predicted from those before it in its window."""


@dataclass(frozen=True)
class LayerError:
    """How far a layer's output is from that with its own weight.

    Args:
        name: the layer.
        kept_in: what its weight is kept in.
        error: the norm of the difference over the norm of the output, on the first window.
    """

    name: str
    kept_in: str
    error: float


@dataclass(frozen=True)
class Evaluation:
    """Figures of a model with weights as they are, and in integers.

    Args:
        num_tokens: that were predicted.
        before, after: perplexities: e to the mean loss of a token, in nats.
        before_bytes, after_bytes: of the weights as the programs read them.
        layers: the layers, the worst first.
    """

    num_tokens: int
    before: float
    after: float
    before_bytes: int
    after_bytes: int
    layers: tuple[LayerError, ...]

    @property
    def worse(self) -> float:
        """By which part the perplexity is larger afterwards."""
        return self.after / self.before - 1


def evaluate(
    model: nn.Module,
    tokens: torch.Tensor,
    *,
    weights: str | None = None,
    activations: str | None = None,
    group: int = 64,
    window: int = WINDOW,
    max_windows: int | None = None,
    kv: str | None = None,
    calibrate: Calibrate = None,
    wider: float = 0.0,
) -> Evaluation:
    """Score a text with a model's weights as they are, and in integers.

    Args:
        model: a causal language model of transformers. Its mode is put back.
        tokens: int64 [tokens], the text; what does not fill a window is left out.
        weights, activations, group, kv, calibrate, wider: as of `zgraph.infer`.
        window: tokens that are scored together.
        max_windows: how many are at most; None takes all.

    Raises:
        UsageError: an option means nothing, or the text does not fill a window.
        QuantisationError, GraphBreakError, CaptureError: as `zgraph.infer`.
    """
    windows = tokens[: len(tokens) // window * window].view(-1, window)[:max_windows]
    if not len(windows) or window < 2:
        raise UsageError(f"the text has {len(tokens)} tokens, and a window {window}; take a longer text")
    recipe_of(weights, activations, group)  # which checks them
    calibrates = is_calibrated(model, calibrate, group) and weights == "int4"
    check_kv(kv)
    check_wider(wider, weights, calibrate)
    was_training = model.training
    model.eval()
    try:
        before, before_bytes = _perplexity(model, windows, recipe_of(None, None, group))
        beside = seen_of(model, weights, activations, group, calibrate, wider)
        wide = layers_left_wide(model, calibrates, beside)
        recipe = recipe_of(weights, activations, group, is_calibrated=calibrates, left_wide=wide)
        after, after_bytes = _perplexity(model, windows, recipe, kv, beside)
        layers = _layer_errors(model, windows[:1], weights, group, beside, wide) if weights else ()
    finally:
        model.train(was_training)
    return Evaluation(windows.numel() - len(windows), before, after, before_bytes, after_bytes, layers)


class _Rounded(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """A layer of a cache that gives keys and values as they come back from int8, and keeps none."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Both, rounded."""
        return tuple(restored(*rounded(states)) for states in (key_states, value_states))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The tokens of this call."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """None before this call."""
        return 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1


class _Score:
    """The summed loss of a window's tokens."""

    def __init__(self, model: nn.Module, kv: str | None) -> None:
        self.model, self.kv = model, kv

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        options: dict[str, Any] = {"use_cache": False}
        if self.kv is not None:
            config: Any = getattr(self.model.config, "get_text_config", lambda **_: self.model.config)(decoder=True)
            cache = Cache(layers=[_Rounded() for _ in range(config.num_hidden_layers)])
            options = {"use_cache": True, "past_key_values": cache}
        logits = self.model(input_ids=tokens, return_dict=True, **options).logits
        return F.cross_entropy(logits[0, :-1].float(), tokens[0, 1:], reduction="sum")


@torch.no_grad()
def _perplexity(
    model: nn.Module,
    windows: torch.Tensor,
    recipe: str,
    kv: str | None = None,
    beside: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> tuple[float, int]:
    """The perplexity by a program, and the bytes of the weights that it reads."""
    device = next(model.parameters()).device
    programs = Programs(model, parse_recipe(recipe), device, compiles=False, beside=beside)
    program = programs.program(model, _Score(model, kv), {"tokens": windows[:1].to(device)}, "score")
    losses = [program({"tokens": row[None].to(device)})[0].item() for row in windows]
    return math.exp(math.fsum(losses) / (windows.numel() - len(windows))), programs.weights_bytes


@dataclass
class _Seen:
    """Squared norms of a layer's output and of its error, added up over calls."""

    output: float = 0.0
    error: float = 0.0


@torch.no_grad()
def _layer_errors(
    model: nn.Module,
    windows: torch.Tensor,
    weights: str,
    group: int,
    beside: Mapping[str, torch.Tensor],
    wide: Collection[str],
) -> tuple[LayerError, ...]:
    """The error that each linear layer makes of what it is given in the plain model."""
    kinds, seen = kept_in(model, weights) | dict.fromkeys(wide, "int8"), dict[str, _Seen]()
    names = {id(p): n for n, p in model.named_parameters()}

    def see(name: str, layer: Any, x: torch.Tensor) -> None:
        found, weight = seen.setdefault(name, _Seen()), rows_of(layer).float()
        integers, scales = integers_of(names[id(layer.weight)])
        if integers in beside:
            change = quantised.from_int4(beside[integers], beside[scales], group) - weight
        else:
            change = as_integers(weight, kinds[name], group) - weight
        found.output += (x.float() @ weight.t()).square().sum().item()
        found.error += (x.float() @ change.t()).square().sum().item()

    with watched(model, see):
        model(input_ids=windows.to(next(model.parameters()).device), use_cache=False)
    found = (LayerError(n, kinds[n], math.sqrt(s.error / s.output)) for n, s in seen.items() if s.output)
    return tuple(sorted(found, key=lambda layer: -layer.error))


def as_integers(weight: torch.Tensor, kept_in: str, group: int) -> torch.Tensor:
    """A weight [outputs, columns] as it is when it comes back from integers, in fp32."""
    if kept_in == "int8":
        data, scale = quantised.to_int8(weight.contiguous(), 1)
        return data.float() * scale
    integers, scales = quantised.nearest(weight.contiguous(), group)
    return quantised.from_int4(quantised.in_pairs(integers), scales, group)
