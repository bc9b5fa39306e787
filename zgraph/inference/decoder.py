"""A decoder's step: tokens of some rows in, logits of each row's last token out, keys and values into the cache."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from zgraph.errors import InferenceError, UsageError
from zgraph.inference.slots import Arena, LayerShape, layer_shapes, slot_cache

PROBE_TOKENS = 6
"""Tokens that a model's step is compared with its own forward on."""


class Step:
    """A call of a model with a cache of slots.

    Args:
        model: a causal language model of transformers.
        shapes: what its layers keep of a token.
        max_len: places for tokens of a row; the cache has one more.
        num_kept: tokens of each row, the last, that logits are wanted of; None is one, without a dimension of its own.
    """

    def __init__(
        self, model: nn.Module, shapes: Sequence[LayerShape], max_len: int, num_kept: int | None = None
    ) -> None:
        self.model, self.shapes, self.max_len, self.num_kept = model, shapes, max_len, num_kept
        self.config: Any = getattr(model.config, "get_text_config", lambda **_: model.config)(decoder=True)
        self.takes = inspect.signature(model.forward).parameters.keys()

    def __call__(self, tokens: torch.Tensor, places: torch.Tensor, *cache: torch.Tensor) -> torch.Tensor:
        """Logits [rows, vocabulary], in fp32, of each row's last token; [rows, tokens, vocabulary] of the last few.

        Args:
            tokens: [rows, tokens].
            places: [rows, tokens], where in its row each token is; `max_len` for what is none.
            cache: the tensors of each layer in turn, which are written to.
        """
        options: dict[str, Any] = {"logits_to_keep": self.num_kept or 1} if "logits_to_keep" in self.takes else {}
        if "position_ids" in self.takes:
            options["position_ids"] = torch.where(places < self.max_len, places, 0)
        out = self.model(
            input_ids=tokens,
            attention_mask=self.mask(places),
            past_key_values=slot_cache(self.shapes, cache, places),
            use_cache=True,
            return_dict=True,
            **options,
        )
        logits: torch.Tensor = out.logits
        return (logits[:, -1] if self.num_kept is None else logits[:, -self.num_kept :]).float()

    def mask(self, places: torch.Tensor) -> Any:
        """The numbers added to scores: 0 for places that a token sees, the smallest number for those behind it.

        One mask, [rows, 1, tokens, places]; or one for each kind of layer, where some see a window.
        """
        kinds = dict.fromkeys(getattr(self.config, "layer_types", None) or ())
        window = getattr(self.config, "sliding_window", None)
        at = torch.arange(self.max_len + 1, device=places.device)[None, None, None, :]
        own = places[:, None, :, None]
        seen, near = at <= own, own - at < (window or 0)
        dtype = self.shapes[0].dtype

        def added(seen: torch.Tensor) -> torch.Tensor:
            zero = torch.zeros((), dtype=dtype, device=places.device)
            return torch.where(seen, zero, torch.finfo(dtype).min)

        if "sliding_attention" in kinds:
            return {kind: added(seen & near if kind == "sliding_attention" else seen) for kind in kinds}
        is_windowed = window is not None and not kinds and getattr(self.config, "use_sliding_window", True)
        return added(seen & near if is_windowed else seen)


def decoder_step(model: nn.Module, max_len: int) -> Step | str:
    """The step of a model, compared with the model's own forward; or why it has no cache of keys and values.

    Raises:
        InferenceError: the step does not compute what the forward does.
    """
    device = next(model.parameters()).device
    vocabulary: int = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    tokens = (torch.arange(1, PROBE_TOKENS + 2, device=device) * 7 % vocabulary)[None]
    kind = type(model).__name__
    with torch.no_grad():
        whole = model(input_ids=tokens, use_cache=True, return_dict=True)
        shapes = layer_shapes(getattr(whole, "past_key_values", None))
        if isinstance(shapes, str):
            return shapes
        wanted = whole.logits[0, -2:].float()
        step = Step(model, shapes, PROBE_TOKENS + 2)
        try:
            found = _probe(step, tokens, device)
        except Exception as error:  # the model's, whatever it is
            raise InferenceError(
                f"{kind} cannot be called with a cache of fixed places ({type(error).__name__}: {error}); use the "
                "model's own generate"
            ) from error
    scale = max(1.0, wanted.abs().max().item())
    worst = (found - wanted).abs().max().item() / scale
    if not worst <= tolerance(shapes[0].dtype):
        raise InferenceError(
            f"{kind} with a cache of fixed places gives logits that differ from its own by {worst:.2g} of the largest: "
            "it is called in a way that is not known here; use the model's own generate"
        )
    return Step(model, shapes, max_len)


def kept_in(step: Step, kv: str | None) -> Step:
    """The step with keys and values kept in int8, or as they are."""
    shapes = [replace(shape, is_rounded=kv == "int8") for shape in step.shapes]
    return Step(step.model, shapes, step.max_len)


def _probe(step: Step, tokens: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Logits of the last two tokens: of a prefill with padding before it, and of one token after it."""
    cache = [*Arena(step.shapes, 1, step.max_len + 1, device).named.values()]
    num = tokens.shape[1] - 1
    padded = torch.cat([tokens.new_zeros(1, 1), tokens[:, :num]], 1)
    places = torch.arange(-1, num, device=device)[None] % (step.max_len + 1)
    first = step(padded, places, *cache)
    second = step(tokens[:, num:], torch.full((1, 1), num, device=device), *cache)
    return torch.cat([first, second])


def tolerance(dtype: torch.dtype) -> float:
    """How far logits of a step may be from the model's own, over the largest."""
    return 1e-4 if dtype in (torch.float32, torch.float64) else 0.1


def arguments(num_rows: int, num_tokens: int, step: Step, device: torch.device) -> Mapping[str, torch.Tensor]:
    """Examples of what a step is called with, by name: memory that nobody reads, each tensor in its own."""
    tokens = torch.zeros(num_rows, num_tokens, dtype=torch.int64, device=device)
    found = {"tokens": tokens, "places": torch.zeros_like(tokens)}
    for number, shape in enumerate(step.shapes):
        for what, (size, dtype) in shape.tensors(num_rows, step.max_len + 1).items():
            found[f"cache.{number}.{what}"] = torch.empty(size, dtype=dtype, device=device)
    return found


def check_max_len(model: nn.Module, max_len: int | None) -> int:
    """Places for tokens of a row: 1,024 by default, or as many as the model was made for.

    Raises:
        UsageError: it is no number above 0, or more than that.
    """
    config: Any = getattr(model.config, "get_text_config", lambda **_: model.config)(decoder=True)
    most = getattr(config, "max_position_embeddings", None)
    if max_len is None:
        return min(1024, most or 1024)
    if isinstance(max_len, bool) or not isinstance(max_len, int) or max_len < 1:
        raise UsageError(f"max_len is a number of tokens above 0, not {max_len!r}")
    if most is not None and max_len > most:
        raise UsageError(
            f"max_len is {max_len}, but {type(model).__name__} was made for {most} tokens; pass at most that"
        )
    return max_len
