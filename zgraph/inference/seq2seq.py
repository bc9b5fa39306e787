"""An encoder with a decoder: a source is taken once for each row, then a token of all rows at a time.

Keys and values of the source are a cache of their own, written once. Rows begin at the same place, so that all are at
the same one in each step, which is what relative positions (T5's) are counted from.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from zgraph.errors import ContextLengthError, InferenceError, UsageError
from zgraph.inference.decoder import Step, tolerance
from zgraph.inference.forwards import Inference
from zgraph.inference.generation import Streamer, stop_tokens
from zgraph.inference.programs import Programs
from zgraph.inference.sampling import Sampling
from zgraph.inference.slots import Arena, LayerShape, SlotLayer, layer_shapes, memories

PROBE_TOKENS = 3
"""Tokens that a model's step is compared with its own forward on."""


class _Lockstep(SlotLayer):  # type: ignore[no-untyped-call]
    """A layer of the decoder's own cache, where all rows are at one place."""

    def get_seq_length(self) -> Any:
        """The place of this call's first token, as a tensor without dimensions."""
        return self.places[0, 0]


class _Source(SlotLayer):  # type: ignore[no-untyped-call]
    """A layer's keys and values of the source, [rows, heads, places, dim]: written whole, or there already."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Write all places of all rows."""
        self.memory["keys"].copy_(key_states)
        self.memory["values"].copy_(value_states)
        return key_states, value_states


@dataclass(frozen=True)
class Shapes:
    """The parts of a row that are kept.

    Args:
        own: of each token, in each layer.
        source: of each place of the source, in each layer.
        source_shape: of one row of the encoder's input.
        source_dtype: of it.
        num_places: of the source, as the decoder sees it.
        width: numbers of the encoder's output for each.
    """

    own: Sequence[LayerShape]
    source: Sequence[LayerShape]
    source_shape: tuple[int, ...]
    source_dtype: torch.dtype
    num_places: int
    width: int


class Seq2SeqStep:
    """Calls of a model with both caches.

    Args:
        model: an encoder with a decoder, of transformers.
        shapes: what it keeps.
        max_len: places for tokens of a row; the cache has one more.
    """

    def __init__(self, model: nn.Module, shapes: Shapes, max_len: int) -> None:
        self.model, self.shapes, self.max_len = model, shapes, max_len
        self.takes = inspect.signature(model.forward).parameters.keys()
        self.main = str(model.main_input_name)
        self.has_mask = self.main == "input_ids"
        self._masks = Step(model, shapes.own, max_len)

    def start(self, source: torch.Tensor, mask: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        """Take a source, and the first token of its answer. Logits [rows, vocabulary], in fp32.

        Args:
            source: what the encoder takes.
            mask: [rows, places], 0 for padding.
            rest: tokens and places, int64 [rows, 1], then the decoder's own cache and that of the source.
        """
        return self._called({self.main: source}, mask, *rest, is_first=True)

    def __call__(self, mask: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        """Take one more token of each row."""
        rows, width = rest[0].shape[0], self.shapes.width
        nothing = torch.zeros((), dtype=self.shapes.own[0].dtype, device=mask.device)
        seen = BaseModelOutput(last_hidden_state=nothing.expand(rows, self.shapes.num_places, width))
        return self._called({"encoder_outputs": seen}, mask, *rest, is_first=False)

    def _called(
        self,
        given: Mapping[str, Any],
        mask: torch.Tensor,
        tokens: torch.Tensor,
        places: torch.Tensor,
        *cache: torch.Tensor,
        is_first: bool,
    ) -> torch.Tensor:
        own, source = cache[: 2 * len(self.shapes.own)], cache[2 * len(self.shapes.own) :]
        both = EncoderDecoderCache(
            Cache(layers=[_Lockstep(memory, places) for memory in memories(self.shapes.own, own)]),
            Cache(layers=[_Source(memory, places) for memory in memories(self.shapes.source, source)]),
        )
        both.is_updated = dict.fromkeys(range(len(self.shapes.source)), not is_first)
        options: dict[str, Any] = {"attention_mask": mask} if self.has_mask else {}
        if "decoder_position_ids" in self.takes:
            options["decoder_position_ids"] = places
        out = self.model(
            **given,
            decoder_input_ids=tokens,
            decoder_attention_mask=self._masks.mask(places),
            past_key_values=both,
            use_cache=True,
            return_dict=True,
            **options,
        )
        logits: torch.Tensor = out.logits[:, -1].float()
        return logits


def seq2seq_step(model: nn.Module, max_len: int, max_source: int | None) -> Seq2SeqStep | str:
    """The step of an encoder with a decoder, compared with its own forward; or why it has no caches.

    Raises:
        UsageError: `max_source` is no number of tokens, or the encoder's inputs have one size.
        InferenceError: the step does not compute what the forward does.
    """
    main, device = str(model.main_input_name), next(model.parameters()).device
    config: Any = model.config
    if main not in ("input_ids", "input_features"):
        return f"its encoder takes {main}; use the model's own generate"
    if main == "input_ids":
        size = 512 if max_source is None else max_source
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise UsageError(f"max_source is a number of tokens above 0, not {max_source!r}")
        source = (torch.arange(size, device=device) * 5 % config.vocab_size)[None]
        mask = (torch.arange(size, device=device) < max(1, size // 2)).long()[None]
    else:
        if max_source is not None:
            raise UsageError(f"{type(model).__name__} takes sources of one size; leave max_source out")
        frames = 2 * config.max_source_positions
        dtype = next(model.parameters()).dtype
        wave = torch.arange(config.num_mel_bins * frames, device=device) % 7 / 7
        source = wave.view(1, config.num_mel_bins, frames).to(dtype)
        mask = torch.ones(1, config.max_source_positions, dtype=torch.int64, device=device)
    tokens = (torch.arange(PROBE_TOKENS, device=device) * 7 % config.vocab_size)[None]
    given: dict[str, Any] = {main: source, **({"attention_mask": mask} if main == "input_ids" else {})}
    with torch.no_grad():
        whole = model(**given, decoder_input_ids=tokens, use_cache=True, return_dict=True)
        cache = whole.past_key_values
        if not isinstance(cache, EncoderDecoderCache):
            return "it gives no caches of its source and of its tokens; use the model's own generate"
        own, seen = layer_shapes(cache.self_attention_cache), layer_shapes(cache.cross_attention_cache)
        if isinstance(own, str) or isinstance(seen, str):
            return str(own if isinstance(own, str) else seen)
        hidden = whole.encoder_last_hidden_state
        shapes = Shapes(own, seen, tuple(source.shape[1:]), source.dtype, hidden.shape[1], hidden.shape[2])
        found = _probe(Seq2SeqStep(model, shapes, PROBE_TOKENS), source, mask, tokens)
    wanted = whole.logits[0].float()
    worst = (found - wanted).abs().max().item() / max(1.0, wanted.abs().max().item())
    if not worst <= tolerance(own[0].dtype):
        raise InferenceError(
            f"{type(model).__name__} with caches of fixed places gives logits that differ from its own by {worst:.2g} "
            "of the largest: it is called in a way that is not known here; use the model's own generate"
        )
    return Seq2SeqStep(model, shapes, max_len)


def _probe(step: Seq2SeqStep, source: torch.Tensor, mask: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of each token, of which the first comes with the source."""
    device = tokens.device
    caches = _arenas(step, 1, device)
    memory = [t for arena in caches for t in arena.named.values()]
    rows = [step.start(source, mask, tokens[:, :1], torch.zeros(1, 1, dtype=torch.int64, device=device), *memory)]
    for at in range(1, tokens.shape[1]):
        places = torch.full((1, 1), at, device=device)
        rows.append(step(mask, tokens[:, at : at + 1], places, *memory))
    return torch.cat(rows)


def _arenas(step: Seq2SeqStep, num_rows: int, device: torch.device) -> tuple[Arena, Arena]:
    shapes = step.shapes
    return (
        Arena(shapes.own, num_rows, step.max_len + 1, device),
        Arena(shapes.source, num_rows, shapes.num_places, device, "source"),
    )


class Seq2Seq(Inference):
    """A model that generates from a source, by two programs over two caches. See `zgraph.infer`.

    Attributes:
        max_batch: rows that it can generate for at once.
        max_len: tokens of an answer, the one that it begins with among them.
        max_source: places of a source.
    """

    def __init__(self, model: nn.Module, step: Seq2SeqStep, programs: Programs, max_batch: int) -> None:
        super().__init__(weakref.ref(model), type(model).__name__, programs)
        self.max_batch, self.max_len, self.max_source = max_batch, step.max_len, step.shapes.num_places
        self.device = next(model.parameters()).device
        self._shapes, self._main = step.shapes, step.main
        config: Any = getattr(model, "generation_config", None)
        self.stops = stop_tokens(getattr(config, "eos_token_id", None))
        self._pad, self._begin = getattr(config, "pad_token_id", None), getattr(config, "decoder_start_token_id", None)
        self.num_words: int = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
        self._arenas = _arenas(step, max_batch, self.device)
        self._cache = {name: t for arena in self._arenas for name, t in arena.named.items()}
        self._row_of = [{n: t for a in self._arenas for n, t in a.row(row).items()} for row in range(max_batch)]
        source = torch.zeros(1, *step.shapes.source_shape, dtype=step.shapes.source_dtype, device=self.device)

        def examples(rows: int) -> dict[str, torch.Tensor]:
            one = torch.zeros(rows, 1, dtype=torch.int64, device=self.device)
            mask = torch.ones(rows, self.max_source, dtype=torch.int64, device=self.device)
            memory = {name: torch.empty_like(t[:rows]) for name, t in self._cache.items()}
            return {"mask": mask, "tokens": one, "places": torch.zeros_like(one), **memory}

        self._start = programs.program(model, step.start, {"source": source, **examples(1)}, "start")
        self._decode = programs.program(model, step, examples(max_batch), "decode", self._cache)

    @property
    def cache_bytes(self) -> int:
        """Bytes of both caches."""
        return sum(arena.num_bytes for arena in self._arenas)

    def generate(  # type: ignore[override]
        self,
        inputs: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        max_new_tokens: int,
        decoder_input_ids: torch.Tensor | None = None,
        streamer: Streamer | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """The answers, int64 [rows, first + new], as transformers' `generate` gives them.

        Args:
            inputs: what the encoder takes, a row for each answer: tokens [rows, tokens], or features.
            attention_mask: [rows, tokens], 0 for padding; None where there is none, or for features.
            max_new_tokens: tokens to make for each row at most.
            decoder_input_ids: int64 [rows, first], what answers begin with; None takes the model's own first token.
            streamer: given what answers begin with, then each step's tokens.
            options: those of `stream`.

        Raises:
            UsageError, ContextLengthError, InferenceError: as `stream` does.
        """
        begin = self._first(inputs, decoder_input_ids)
        made = [begin]
        if streamer is not None:
            streamer.put(begin.cpu())
        given = {"max_new_tokens": max_new_tokens, "decoder_input_ids": begin, **options}
        for tokens in self.stream(inputs, attention_mask, **given):
            made.append(tokens[:, None])
            if streamer is not None:
                streamer.put(tokens.cpu())
        if streamer is not None:
            streamer.end()
        return torch.cat(made, 1)

    def stream(
        self,
        inputs: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        max_new_tokens: int,
        decoder_input_ids: torch.Tensor | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[torch.Tensor]:
        """The tokens of answers, one step after the other, each int64 [rows].

        Args:
            inputs, attention_mask, max_new_tokens, decoder_input_ids: as of `generate`.
            do_sample, temperature, top_k, top_p, eos_token_id, pad_token_id, generator: as of `Generator.stream`.

        Raises:
            UsageError: an argument means nothing, or there are more rows than `max_batch`.
            ContextLengthError: a source or an answer is longer than its cache.
            InferenceError: the model gave logits that are no numbers.
        """
        sampling = Sampling(do_sample, temperature, top_k, top_p)
        stops = self.stops if eos_token_id is None else stop_tokens(eos_token_id)
        pad = next((p for p in (pad_token_id, self._pad, *stops) if p is not None), 0)
        begin = self._first(inputs, decoder_input_ids)
        source, mask = self._padded(inputs, attention_mask)
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is a number of tokens above 0, not {max_new_tokens!r}")
        if begin.shape[1] + max_new_tokens > self.max_len + 1:
            raise ContextLengthError(
                f"{begin.shape[1]} tokens and {max_new_tokens} new ones are more than the {self.max_len} places of the "
                f"cache and the last; pass max_len={begin.shape[1] + max_new_tokens - 1} to zgraph.infer"
            )
        return self._steps(source, mask, begin, max_new_tokens, sampling, stops, pad, generator)

    @torch.no_grad()
    def _steps(
        self,
        source: torch.Tensor,
        mask: torch.Tensor,
        begin: torch.Tensor,
        num_steps: int,
        sampling: Sampling,
        stops: tuple[int, ...],
        pad: int,
        generator: torch.Generator | None,
    ) -> Iterator[torch.Tensor]:
        self.programs.refresh()
        rows, first = begin.shape
        all_masks = torch.ones(self.max_batch, self.max_source, dtype=torch.int64, device=self.device)
        all_masks[:rows] = mask
        tokens = torch.zeros(self.max_batch, 1, dtype=torch.int64, device=self.device)
        places = torch.zeros_like(tokens)
        found = []
        for row in range(rows):
            one = slice(row, row + 1)
            given = {"source": source[one], "mask": mask[one], "tokens": begin[one, :1].contiguous()}
            found.append(self._start({**given, "places": places[:1], **self._row_of[row]})[0])
        logits = torch.cat(found)

        def decoded(chosen: torch.Tensor) -> torch.Tensor:
            tokens[:rows, 0] = chosen
            places.add_(1)
            return self._decode({"mask": all_masks, "tokens": tokens, "places": places, **self._cache})[0][:rows]

        for at in range(1, first):
            logits = decoded(begin[:, at])
        has_ended = torch.zeros(rows, dtype=torch.bool, device=self.device)
        ends = torch.tensor(stops, dtype=torch.int64, device=self.device)
        for step in range(num_steps):
            if not bool(torch.isfinite(logits).all()):
                for arena in self._arenas:
                    arena.resize(is_there=True)
                raise InferenceError(
                    f"{self.kind} gives logits that are no numbers; look for weights that are none, or infer in fp32"
                )
            chosen = torch.where(has_ended, pad, sampling.choose(logits, generator))
            yield chosen
            has_ended |= torch.isin(chosen, ends)
            if step + 1 == num_steps or bool(has_ended.all()):
                return
            logits = decoded(chosen)

    def _first(self, inputs: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor:
        """The tokens that answers begin with."""
        if given is None:
            if self._begin is None:
                raise UsageError(f"{self.kind} does not say what answers begin with; pass decoder_input_ids")
            return torch.full((len(inputs), 1), int(self._begin), dtype=torch.int64, device=self.device)
        if given.dim() != 2 or len(given) != len(inputs) or given.is_floating_point() or not given.shape[1]:
            raise UsageError("decoder_input_ids is [rows, tokens] of integers, with a row for each source")
        if int(given.min()) < 0 or int(given.max()) >= self.num_words:
            raise UsageError(f"decoder_input_ids has a token outside of 0 to {self.num_words - 1}")
        return given.to(self.device)

    def _padded(self, inputs: torch.Tensor, attention_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Sources with as many places as the encoder's program has, and their mask."""
        shape, dtype = self._shapes.source_shape, self._shapes.source_dtype
        if not isinstance(inputs, torch.Tensor) or inputs.dim() != 1 + len(shape) or not len(inputs):
            raise UsageError(f"{self._main} is a tensor of {1 + len(shape)} dims, a row for each answer")
        if len(inputs) > self.max_batch:
            raise UsageError(
                f"{len(inputs)} sources are more than the {self.max_batch} rows of the cache; pass fewer, or "
                f"max_batch={len(inputs)} to zgraph.infer"
            )
        if inputs.is_floating_point() != dtype.is_floating_point:
            raise UsageError(f"{self._main} is {dtype}, not {inputs.dtype}")
        if self._main != "input_ids":
            if tuple(inputs.shape[1:]) != shape:
                raise UsageError(f"{self._main} has {shape} numbers a row, not {tuple(inputs.shape[1:])}")
            if attention_mask is not None:
                raise UsageError(f"{self.kind} takes no attention_mask beside {self._main}; leave it out")
            ones = torch.ones(len(inputs), self.max_source, dtype=torch.int64, device=self.device)
            return inputs.to(self.device, dtype), ones
        rows, num_tokens = inputs.shape
        if num_tokens > self.max_source:
            raise ContextLengthError(
                f"a source of {num_tokens} tokens is longer than {self.max_source}; pass max_source={num_tokens} to "
                "zgraph.infer"
            )
        if attention_mask is not None and attention_mask.shape != inputs.shape:
            raise UsageError(
                f"attention_mask is {tuple(attention_mask.shape)}, and input_ids {tuple(inputs.shape)}; they have one "
                "entry for each token"
            )
        keep = torch.ones_like(inputs) if attention_mask is None else (attention_mask != 0).to(inputs.dtype)
        used = inputs[keep.bool()]
        if not bool(keep.any(1).all()) or int(used.min()) < 0 or int(used.max()) >= self.num_words:
            raise UsageError(f"a source has no token, or one outside of 0 to {self.num_words - 1}")
        wide = torch.zeros(rows, self.max_source, dtype=torch.int64, device=self.device)
        mask = torch.zeros_like(wide)
        wide[:, :num_tokens], mask[:, :num_tokens] = inputs * keep, keep
        return wide, mask
