"""Tokens by two programs, prefill and decode, over a cache with fixed places."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from zgraph.errors import ContextLengthError, InferenceError, UsageError
from zgraph.inference.calls import Calls
from zgraph.inference.forwards import Inference
from zgraph.inference.prompts import Prompts
from zgraph.inference.sampling import Sampling
from zgraph.inference.speculation import Drafted, speculated


class Streamer(Protocol):
    """Takes tokens as they are made, as transformers' streamers do."""

    def put(self, value: torch.Tensor) -> None: ...

    def end(self) -> None: ...


class Generator(Inference):
    """A model that generates by two programs, prefill and decode, over a cache with fixed places. See `zgraph.infer`.

    Attributes:
        max_batch: rows that it can generate for at once.
        max_len: tokens of a row, the prompt's among them.
        num_words: tokens of the vocabulary.
        stops: tokens that end a row, by the model's generation_config.
        drafted: proposals of a draft in the last call that had one, and how many were taken.
    """

    def __init__(self, model: nn.Module, calls: Calls) -> None:
        super().__init__(weakref.ref(model), type(model).__name__, calls.programs)
        self.calls, self.max_batch, self.max_len = calls, calls.num_rows, calls.max_len
        self.stops = stop_tokens(getattr(getattr(model, "generation_config", None), "eos_token_id", None))
        self.num_words: int = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
        self._pad = _pad_token(model)
        self.drafted = Drafted()

    @property
    def wire_bytes(self) -> int:
        """Bytes that a rank sends for one token of each row; of tokens that are drawn, without these themselves."""
        return self.calls.wire_bytes

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache, all rows and places of it."""
        return self.calls.arena.num_bytes

    def generate(  # type: ignore[override]
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
        draft: Generator | None = None,
        num_drafted: int = 4,
    ) -> Iterator[torch.Tensor]:
        """The tokens that follow prompts, one step after the other, each int64 [rows].

        Args:
            input_ids, attention_mask, max_new_tokens: as of `generate`.
            do_sample, temperature, top_k, top_p: see `Sampling`.
            eos_token_id: tokens that end a row; None takes those of the model's generation_config.
            pad_token_id: what follows in a row that has ended; None takes the model's, or else a token that ends rows.
            generator: draws, where something is drawn; None is torch's own.
            draft: a smaller model of the same tokens, by `zgraph.infer`, that proposes tokens: the likeliest are the
                same as without, up to rounding, as this model looks at several tokens at once, in fewer calls of it.
                `drafted` has the counts of the last call.
            num_drafted: tokens that it proposes at a time.

        Raises:
            UsageError: an argument means nothing, or there are more rows than `max_batch`.
            ContextLengthError: a prompt and `max_new_tokens` are more than `max_len`.
            InferenceError: the model gave logits that are no numbers.
        """
        sampling = Sampling(do_sample, temperature, top_k, top_p)
        stops = self.stops if eos_token_id is None else stop_tokens(eos_token_id)
        pad = next((p for p in (pad_token_id, self._pad, *stops) if p is not None), 0)
        prompts = Prompts(input_ids, attention_mask, self.num_words)
        self._check(prompts, max_new_tokens)
        if draft is not None:
            self._check_draft(draft, num_drafted, sampling)
            draft._check(prompts, max_new_tokens)
            return self._speculated(draft, num_drafted, prompts, max_new_tokens, stops, pad)
        return self._steps(prompts, max_new_tokens, sampling, stops, pad, generator)

    @torch.no_grad()
    def logits(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of the token that follows each prompt, fp32 [rows, vocabulary]. Raises what `stream` does."""
        prompts = Prompts(input_ids, attention_mask, self.num_words)
        self._check(prompts, 1)
        self.programs.refresh()
        self.calls.check_alike(repr(prompts.listed))
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
        self.calls.check_alike(repr((prompts.listed, num_steps, sampling, stops, pad)))
        num_rows, device = prompts.num_rows, self.calls.device
        logits = self._prefilled(prompts)
        at = torch.full((self.max_batch,), self.max_len, dtype=torch.int64, device=device)
        at[:num_rows] = torch.tensor(prompts.lengths, device=device)
        has_ended = torch.zeros(num_rows, dtype=torch.bool, device=device)
        ends = torch.tensor(stops, dtype=torch.int64, device=device)
        tokens = torch.zeros(self.max_batch, dtype=torch.int64, device=device)
        for step in range(num_steps):
            chosen = sampling.choose(logits, generator)
            if sampling.do_sample:
                chosen = self.calls.of_first(chosen)
            chosen = torch.where(has_ended, pad, chosen)
            yield chosen.to(prompts.device)
            has_ended |= torch.isin(chosen, ends)
            if step + 1 == num_steps or bool(has_ended.all()):
                return
            tokens[:num_rows] = chosen
            at[:num_rows].masked_fill_(has_ended, self.max_len)
            logits = self._checked(self.calls.decode(tokens, at)[:num_rows])
            at[:num_rows] += ~has_ended

    def _check_draft(self, draft: Generator, num_drafted: int, sampling: Sampling) -> None:
        if not isinstance(draft, Generator) or draft.calls is self.calls:
            raise UsageError("draft is another model that generates, by zgraph.infer, with a cache of its own")
        if draft.num_words != self.num_words:
            raise UsageError(
                f"draft has {draft.num_words} tokens, and this model {self.num_words}; take one of the same vocabulary"
            )
        if isinstance(num_drafted, bool) or not isinstance(num_drafted, int) or num_drafted < 1:
            raise UsageError(f"num_drafted is a number of tokens above 0, not {num_drafted!r}")
        if sampling.do_sample:
            raise UsageError("draft= is for the likeliest tokens; leave it or do_sample=True out")
        if not (self.calls.is_alone and draft.calls.is_alone):
            raise UsageError("draft= is for one rank; leave it or tensor_parallel= out")

    @torch.no_grad()
    def _speculated(
        self, draft: Generator, num: int, prompts: Prompts, num_steps: int, stops: tuple[int, ...], pad: int
    ) -> Iterator[torch.Tensor]:
        self.programs.refresh()
        draft.programs.refresh()
        self.drafted = Drafted()
        draft._prefilled(prompts)
        first = self._prefilled(prompts).argmax(-1).tolist()

        def verify(tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
            logits = self.calls.verify(self._model(), tokens, places)
            self._checked(logits[: prompts.num_rows])
            return logits

        for made in speculated(
            self.calls, verify, draft.calls, first, prompts.lengths, num_steps, stops, self.drafted, num
        ):
            yield torch.tensor([pad if token is None else token for token in made], device=prompts.device)

    def _prefilled(self, prompts: Prompts) -> torch.Tensor:
        """Logits of the prompts' last tokens, with their keys and values in the cache."""
        rows = [list(self.calls.prefill(row, tokens))[-1] for row, tokens in enumerate(prompts.rows)]
        return self._checked(torch.stack(rows))

    def _checked(self, logits: torch.Tensor) -> torch.Tensor:
        if not bool(torch.isfinite(logits).all()):
            self.calls.clear()
            raise InferenceError(
                f"{self.kind} gives logits that are no numbers; look for weights that are none, or infer in fp32"
            )
        return logits


def stop_tokens(found: int | Sequence[int] | None) -> tuple[int, ...]:
    """Tokens that end a row."""
    if found is None:
        return ()
    return (found,) if isinstance(found, int) else tuple(found)


def _pad_token(model: nn.Module) -> int | None:
    found = getattr(getattr(model, "generation_config", None), "pad_token_id", None)
    return found if isinstance(found, int) else None
