"""The cost of keeping weights in integers, on text: perplexity before and after, and the error of each layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin

from zgraph.codegen import quantised
from zgraph.errors import UsageError
from zgraph.inference.model import check_kv, recipe_of
from zgraph.inference.programs import Programs
from zgraph.inference.slots import rounded
from zgraph.passes import parse_recipe
from zgraph.passes.quantise import Quantise

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
) -> Evaluation:
    """Score a text with a model's weights as they are, and in integers.

    Args:
        model: a causal language model of transformers. Its mode is put back.
        tokens: int64 [tokens], the text; what does not fill a window is left out.
        weights, activations, group, kv: as of `zgraph.infer`.
        window: tokens that are scored together.
        max_windows: how many are at most; None takes all.

    Raises:
        UsageError: an option means nothing, or the text does not fill a window.
        QuantisationError, GraphBreakError, CaptureError: as `zgraph.infer`.
    """
    windows = tokens[: len(tokens) // window * window].view(-1, window)[:max_windows]
    if not len(windows) or window < 2:
        raise UsageError(f"the text has {len(tokens)} tokens, and a window {window}; take a longer text")
    recipe = recipe_of(weights, activations, group)
    check_kv(kv)
    was_training = model.training
    model.eval()
    try:
        before, before_bytes = _perplexity(model, windows, recipe_of(None, None, group))
        after, after_bytes = _perplexity(model, windows, recipe, kv)
        layers = _layer_errors(model, windows[:1], weights, group) if weights else ()
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
        both = (rounded(states) for states in (key_states, value_states))
        return tuple((data.float() * scale).to(key_states.dtype) for data, scale in both)

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
def _perplexity(model: nn.Module, windows: torch.Tensor, recipe: str, kv: str | None = None) -> tuple[float, int]:
    """The perplexity by a program, and the bytes of the weights that it reads."""
    device = next(model.parameters()).device
    programs = Programs(model, parse_recipe(recipe), device, compiles=False)
    program = programs.program(model, _Score(model, kv), {"tokens": windows[:1].to(device)}, "score")
    losses = [program({"tokens": row[None].to(device)})[0].item() for row in windows]
    return math.exp(math.fsum(losses) / (windows.numel() - len(windows))), programs.weights_bytes


@dataclass
class _Seen:
    """Squared norms of a layer's output and of its error, added up over calls."""

    output: float = 0.0
    error: float = 0.0
    kept_in: str = ""
    change: torch.Tensor | None = field(default=None, repr=False)


@torch.no_grad()
def _layer_errors(model: nn.Module, windows: torch.Tensor, weights: str, group: int) -> tuple[LayerError, ...]:
    """The error that each linear layer makes of what it is given in the plain model."""
    wider = Quantise().wider.split("+")
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    seen: dict[str, _Seen] = {}
    with _watched(model, seen) as layers:
        for name, layer in layers.items():
            is_wide = name.rpartition(".")[2] in wider or id(layer.weight) in tied
            seen[name] = _Seen(kept_in="int8" if is_wide else weights)
            seen[name].change = as_integers(_rows(layer), seen[name].kept_in, group) - _rows(layer)
        model(input_ids=windows.to(next(model.parameters()).device), use_cache=False)
    found = (LayerError(n, s.kept_in, math.sqrt(s.error / s.output)) for n, s in seen.items() if s.output)
    return tuple(sorted(found, key=lambda layer: -layer.error))


@contextmanager
def _watched(model: nn.Module, seen: dict[str, _Seen]) -> Iterator[dict[str, Any]]:
    """A model whose linear layers add to what is seen of them."""
    layers: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) or _is_turned(m)}

    def watch(name: str) -> Any:
        def hook(layer: nn.Module, given: Sequence[torch.Tensor], _output: torch.Tensor) -> None:
            x, found = given[0].float(), seen[name]
            assert found.change is not None
            found.output += (x @ _rows(layer).t()).square().sum().item()
            found.error += (x @ found.change.t()).square().sum().item()

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        yield layers
    finally:
        for handle in handles:
            handle.remove()


def _is_turned(module: nn.Module) -> bool:
    """Whether a layer is GPT-2's, whose weight is [columns, outputs]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _rows(layer: Any) -> torch.Tensor:
    """A layer's weight in fp32, a row for each output."""
    weight: torch.Tensor = layer.weight.float()
    return weight.t() if _is_turned(layer) else weight


def as_integers(weight: torch.Tensor, kept_in: str, group: int) -> torch.Tensor:
    """A weight [outputs, columns] as it is when it comes back from integers, in fp32."""
    if kept_in == "int8":
        data, scale = quantised.to_int8(weight.contiguous(), 1)
        return data.float() * scale
    integers, scales = quantised.nearest(weight.contiguous(), group)
    return quantised.from_int4((integers[:, ::2] | integers[:, 1::2] << 4).to(torch.uint8), scales, group)
