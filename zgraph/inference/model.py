"""`zgraph.infer`: a model as programs for inference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from zgraph.bridge.private_inductor import inductor_problem
from zgraph.errors import ContextLengthError, InferenceError, UsageError
from zgraph.inference.decoder import Step, arguments, check_max_len, decoder_step
from zgraph.inference.programs import Program, Programs
from zgraph.inference.prompts import Prompts
from zgraph.inference.sampling import Sampling
from zgraph.inference.slots import Arena
from zgraph.options.validate import ATTRIBUTE
from zgraph.passes import parse_recipe
from zgraph.passes.quantise import GROUPS

CHUNK = 64
"""Tokens of a prompt that one call of the prefill takes."""

RECIPE = "canonicalize,grouped-heads,dce,in-place"
"""The passes for a model whose weights stay as they are."""

WEIGHTS, ACTIVATIONS, KERNELS = ("int8", "int4"), ("int8",), ("aten", "inductor")
"""What options may be, beside None."""


def recipe_of(weights: str | None, activations: str | None, group: int) -> str:
    """The passes for a model whose weights are kept so.

    Raises:
        UsageError: the options mean nothing, alone or together.
    """
    for name, value, known in (("weights", weights, WEIGHTS), ("activations", activations, ACTIVATIONS)):
        if value is not None and value not in known:
            raise UsageError(f"{name} must be None or one of {', '.join(known)}, not {value!r}")
    if activations is not None and weights != "int8":
        raise UsageError('activations="int8" multiplies integers with integers: pass weights="int8" too')
    if group not in GROUPS:
        raise UsageError(f"group must be one of {', '.join(map(str, GROUPS))}, not {group!r}")
    if weights is None:
        return RECIPE
    options = {"weights": weights, "activations": activations, "group": group if weights == "int4" else None}
    text = ", ".join(f"{name}={value}" for name, value in options.items() if value is not None)
    return RECIPE.replace("canonicalize,", f"canonicalize,quantise({text}),")


class Streamer(Protocol):
    """Takes tokens as they are made, as transformers' streamers do."""

    def put(self, value: torch.Tensor) -> None: ...

    def end(self) -> None: ...


class Inference:
    """A model that generates by two programs, prefill and decode, over a cache with fixed places. See `infer`.

    Attributes:
        max_batch: rows that it can generate for at once.
        max_len: tokens of a row, the prompt's among them.
    """

    def __init__(self, model: nn.Module, step: Step, programs: Programs, arena: Arena, max_batch: int) -> None:
        self.max_batch, self.max_len = max_batch, step.max_len
        self.programs, self._arena = programs, arena
        self._kind, self._pad = type(model).__name__, _pad_token(model)
        self._stops = _stops(getattr(getattr(model, "generation_config", None), "eos_token_id", None))
        self._vocabulary: int = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
        self._cache = {
            f"cache.{n // 2}.{'values' if n % 2 else 'keys'}": tensor for n, tensor in enumerate(arena.tensors)
        }
        device = arena.tensors[0].device
        self.chunk = min(CHUNK, self.max_len)

        def program(num_tokens: int, name: str) -> Program:
            return programs.program(model, step, arguments(max_batch, num_tokens, step, device), name)

        self._prefill, self._decode = program(self.chunk, "prefill"), program(1, "decode")

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weights as the programs read them."""
        return self.programs.weights_bytes

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache, all rows and places of it."""
        return self._arena.num_bytes

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        max_new_tokens: int,
        streamer: Streamer | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """The prompts with the tokens that follow them, int64 [rows, prompt + new], as transformers' `generate` gives.

        Generation ends when all rows have ended. A row that ended before others is filled with the padding token.

        Args:
            input_ids: int64 [rows, tokens], padded on the left.
            attention_mask: [rows, tokens], 0 for padding; None where there is none.
            max_new_tokens: tokens to make for each row at most.
            streamer: given the prompts, then each step's tokens, [rows].
            options: those of `stream`.

        Raises:
            UsageError, ContextLengthError, InferenceError: as `stream` does.
        """
        made = [input_ids]
        if streamer is not None:
            streamer.put(input_ids.cpu())
        for tokens in self.stream(input_ids, attention_mask, max_new_tokens=max_new_tokens, **options):
            made.append(tokens[:, None])
            if streamer is not None:
                streamer.put(tokens.cpu())
        if streamer is not None:
            streamer.end()
        return torch.cat(made, 1)

    def stream(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        max_new_tokens: int,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[torch.Tensor]:
        """The tokens that follow prompts, one step after the other, each int64 [rows].

        Args:
            input_ids, attention_mask, max_new_tokens: as of `generate`.
            do_sample, temperature, top_k, top_p: see `Sampling`.
            eos_token_id: tokens that end a row; None takes those of the model's generation_config.
            pad_token_id: what follows in a row that has ended; None takes the model's, or else a token that ends rows.
            generator: draws, where something is drawn; None is torch's own.

        Raises:
            UsageError: an argument means nothing, or there are more rows than `max_batch`.
            ContextLengthError: a prompt and `max_new_tokens` are more than `max_len`.
            InferenceError: the model gave logits that are no numbers.
        """
        sampling = Sampling(do_sample, temperature, top_k, top_p)
        stops = self._stops if eos_token_id is None else _stops(eos_token_id)
        pad = next((p for p in (pad_token_id, self._pad, *stops) if p is not None), 0)
        prompts = Prompts(input_ids, attention_mask, self._vocabulary)
        self._check(prompts, max_new_tokens)
        return self._steps(prompts, max_new_tokens, sampling, stops, pad, generator)

    @torch.no_grad()
    def logits(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of the token that follows each prompt, fp32 [rows, vocabulary]. Raises what `stream` does."""
        prompts = Prompts(input_ids, attention_mask, self._vocabulary)
        self._check(prompts, 1)
        self.programs.refresh()
        return self._prefilled(prompts)

    def _check(self, prompts: Prompts, max_new_tokens: int) -> None:
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is a number of tokens above 0, not {max_new_tokens!r}")
        if prompts.num_rows > self.max_batch:
            raise UsageError(
                f"{prompts.num_rows} prompts are more than the {self.max_batch} rows of the cache; pass fewer, or "
                f"max_batch={prompts.num_rows} to zgraph.infer"
            )
        longest = max(prompts.lengths)
        if longest + max_new_tokens > self.max_len:
            raise ContextLengthError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones are more than the {self.max_len} places "
                f"of the cache; pass max_len={longest + max_new_tokens} to zgraph.infer, or ask for fewer"
            )

    @torch.no_grad()
    def _steps(
        self,
        prompts: Prompts,
        num_steps: int,
        sampling: Sampling,
        stops: tuple[int, ...],
        pad: int,
        generator: torch.Generator | None,
    ) -> Iterator[torch.Tensor]:
        self.programs.refresh()
        num_rows, device = prompts.num_rows, self._arena.tensors[0].device
        logits = self._prefilled(prompts)
        at = torch.full((self.max_batch,), self.max_len, dtype=torch.int64, device=device)
        at[:num_rows] = torch.tensor(prompts.lengths, device=device)
        has_ended = torch.zeros(num_rows, dtype=torch.bool, device=device)
        ends = torch.tensor(stops, dtype=torch.int64, device=device)
        tokens = torch.zeros(self.max_batch, 1, dtype=torch.int64, device=device)
        for step in range(num_steps):
            chosen = torch.where(has_ended, pad, sampling.choose(logits, generator))
            yield chosen.to(prompts.device)
            has_ended |= torch.isin(chosen, ends)
            if step + 1 == num_steps or bool(has_ended.all()):
                return
            tokens[:num_rows, 0] = chosen
            at[:num_rows].masked_fill_(has_ended, self.max_len)
            logits = self._call(self._decode, tokens, at[:, None])[:num_rows]
            at[:num_rows] += ~has_ended

    def _prefilled(self, prompts: Prompts) -> torch.Tensor:
        """Logits of the prompts' last tokens, with their keys and values in the cache."""
        logits = None
        for tokens, places in prompts.chunks(self.chunk, self.max_batch, self.max_len):
            device = self._arena.tensors[0].device
            logits = self._call(self._prefill, tokens.to(device), places.to(device))
        assert logits is not None, "a prompt has a token"
        return logits[: prompts.num_rows]

    def _call(self, program: Program, tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        (logits,) = program({"tokens": tokens, "places": places, **self._cache})
        if not bool(torch.isfinite(logits).all()):
            self._arena.clear()
            raise InferenceError(
                f"{self._kind} gives logits that are no numbers; look for weights that are none, or infer in fp32"
            )
        return logits


def infer(
    model: nn.Module,
    *,
    max_batch: int = 1,
    max_len: int | None = None,
    weights: str | None = None,
    activations: str | None = None,
    group: int = 64,
    kernels: str = "aten",
) -> Inference:
    """Capture a model's prefill and decode, and link them to run over a cache with fixed places.

        inference = zgraph.infer(model, max_batch=8, max_len=512)
        tokens = inference.generate(ids, attention_mask, max_new_tokens=64)

    Nothing of torch.compile runs for a token. The model itself is not changed, and where its weights are written to,
    the next call computes with the new ones.

    Args:
        model: a causal language model of transformers, on one device.
        max_batch: rows to generate for at once. A call with fewer rows takes as long as one with all.
        max_len: tokens of a row, the prompt's among them; None takes 1,024, or what the model was made for if that is
            less.
        weights: what they are kept in: None leaves them; "int8" has a scale for each output of a layer; "int4" one for
            each group of columns, and int8 for embeddings and the projection to the vocabulary. Both are approximate.
        activations: "int8" rounds each token's before it meets a weight in int8, which is faster, and less exact.
        group: columns that share a scale in int4: 32, 64 or 128.
        kernels: what runs the ops: "aten", torch's own; or "inductor", those between writes compiled together.

    Raises:
        UsageError: an option means nothing, or the model is compiled already or has no cache.
        QuantisationError: a layer's columns or outputs do not fit the integers.
        InferenceError: the model does not compute with such a cache what it computes without.
        GraphBreakError, CaptureError: a call cannot be captured as one graph.
    """
    device = _check_model(model)
    if isinstance(max_batch, bool) or not isinstance(max_batch, int) or max_batch < 1:
        raise UsageError(f"max_batch is a number of rows above 0, not {max_batch!r}")
    if kernels not in KERNELS:
        raise UsageError(f"kernels must be one of {', '.join(KERNELS)}, not {kernels!r}")
    pipeline = parse_recipe(recipe_of(weights, activations, group))
    if kernels == "inductor" and (problem := inductor_problem(device)):
        raise UsageError(f'kernels="inductor" cannot compile here: {problem}; kernels="aten" needs nothing')
    was_training = model.training
    model.eval()
    try:
        step = decoder_step(model, check_max_len(model, max_len))
        programs = Programs(model, pipeline, device, compiles=kernels == "inductor")
        arena = Arena(step.shapes, max_batch, step.max_len + 1, device)
        return Inference(model, step, programs, arena, max_batch)
    finally:
        model.train(was_training)


def _check_model(model: nn.Module) -> torch.device:
    """The device of a model that can be captured for inference."""
    if not isinstance(model, nn.Module):
        raise UsageError(f"infer takes a module, not a {type(model).__name__}")
    if ATTRIBUTE in model.__dict__:
        raise UsageError(
            f"this {type(model).__name__} is compiled for training; load its state_dict, gathered by zgraph.export_hf, "
            "into a plain one and pass that"
        )
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1 or torch.device("meta") in devices:
        raise UsageError(
            f"{type(model).__name__} is on {', '.join(sorted(map(str, devices))) or 'no device'}; infer takes a model "
            "whose weights are on one device"
        )
    if not callable(getattr(model, "get_output_embeddings", None)) or not hasattr(model, "config"):
        raise UsageError(
            f"{type(model).__name__} is no causal language model of transformers; call zgraph.compile for another"
        )
    if model.get_output_embeddings() is None:  # type: ignore[operator]
        raise UsageError(f"{type(model).__name__} has no head that gives tokens; take its ...ForCausalLM")
    return devices.pop()


def _stops(found: int | Sequence[int] | None) -> tuple[int, ...]:
    """Tokens that end a row."""
    if found is None:
        return ()
    return (found,) if isinstance(found, int) else tuple(found)


def _pad_token(model: nn.Module) -> int | None:
    found = getattr(getattr(model, "generation_config", None), "pad_token_id", None)
    return found if isinstance(found, int) else None
