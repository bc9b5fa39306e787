"""Continuous batching: requests take slots of the cache and leave them between the tokens of others.

Each step takes one piece of one waiting prompt, so that those that generate wait for no more than that, and one token
of every row that generates. This is the batching of Orca (Yu et al., OSDI 2022, iteration-level scheduling), with the
pieces of Sarathi (Agrawal et al., 2023).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from zgraph.errors import ContextLengthError, UsageError
from zgraph.inference.generation import Generator
from zgraph.inference.orders import FIRST_HAS_REQUESTS, NO_ROW, Leader, Piece
from zgraph.inference.sampling import Sampling


@dataclass(frozen=True)
class Request:
    """A prompt, and what is to follow it.

    Args:
        tokens: of the prompt, one at least.
        max_new_tokens: to make at most.
        sampling: how each is chosen.
        seed: of the draws; None draws from torch's own generator.
        stops: tokens that end it; None takes those of the model's generation_config.
    """

    tokens: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    stops: Sequence[int] | None = None


@dataclass(frozen=True)
class Made:
    """A token that a request was given, or its end.

    Args:
        number: of the request.
        token: None where it ended without one.
        ended: why no more follow: "stop" (a token that ends it), "length" (there are as many as were asked for) or
            "error" (logits that are no numbers); empty where more do.
    """

    number: int
    token: int | None
    ended: str = ""


class _Running:
    """A request that is waited for."""

    def __init__(self, number: int, request: Request, stops: frozenset[int], device: torch.device) -> None:
        self.number, self.request, self.stops = number, request, stops
        self.prompt = torch.tensor(request.tokens, dtype=torch.int64)
        self.draws: torch.Generator | None = None
        if request.seed is not None:
            self.draws = torch.Generator(device).manual_seed(request.seed)
        self.num_taken = self.num_made = 0
        self.pieces: Iterator[Piece] = iter(())


class ContinuousBatch:
    """Requests that come and go between steps of one model.

        batch = ContinuousBatch(zgraph.infer(model, max_batch=8))
        number = batch.submit(Request([1, 2, 3], max_new_tokens=16))
        while batch.is_busy:
            for made in batch.step():
                ...

    A request's tokens are those of `Generator.generate` for it alone: draws with a seed, too. One thread at a time.

    Over ranks that compute together, the first has the batch, the others call `zgraph.inference.orders.follow`. They
    run what it runs, and wait while it has no requests, until it is closed.

    Args:
        generator: a model of `zgraph.infer`. Nothing else may generate with it meanwhile.

    Attributes:
        leader: tells the other ranks; None on one rank.

    Raises:
        UsageError: it cannot generate, or this is not the first of the ranks that compute together.
    """

    def __init__(self, generator: Generator) -> None:
        if not isinstance(generator, Generator):
            raise UsageError(
                f"a {type(generator).__name__} cannot generate; pass what zgraph.infer gives for a decoder"
            )
        self.generator, self.calls = generator, generator.calls
        if not self.calls.is_first:
            raise UsageError(FIRST_HAS_REQUESTS)
        self.leader = None if self.calls.is_alone else Leader(self.calls)
        num_rows = self.calls.num_rows
        self._rows: list[_Running | None] = [None] * num_rows
        self._filling: deque[int] = deque()
        self._waiting: deque[_Running] = deque()
        self._tokens = torch.zeros(num_rows, dtype=torch.int64, device=self.calls.device)
        self._places = torch.full_like(self._tokens, self.calls.max_len)
        self._next = 0

    @property
    def is_busy(self) -> bool:
        """Whether a step would do something."""
        return bool(self._waiting) or self.num_running > 0

    @property
    def num_running(self) -> int:
        """Requests that have a row of the cache."""
        return sum(row is not None for row in self._rows)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a row."""
        return len(self._waiting)

    def check(self, request: Request) -> None:
        """Refuse what cannot be generated.

        Raises:
            UsageError: a token is none of the vocabulary, or a number means nothing.
            ContextLengthError: the prompt and the new tokens are more than a row has places for.
        """
        if not request.tokens:
            raise UsageError("the prompt has no token; pass one at least")
        if min(request.tokens) < 0 or max(request.tokens) >= self.generator.num_words:
            raise UsageError(f"the prompt has a token outside of 0 to {self.generator.num_words - 1}")
        if request.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is a number above 0, not {request.max_new_tokens}")
        if request.seed is not None and not -(2**63) <= request.seed < 2**63:
            raise UsageError("seed is an integer of 64 bits")
        if len(request.tokens) + request.max_new_tokens > self.calls.max_len:
            raise ContextLengthError(
                f"a prompt of {len(request.tokens)} tokens and {request.max_new_tokens} new ones are more than the "
                f"{self.calls.max_len} places of the cache; ask for fewer, or make it larger with max_len"
            )

    def submit(self, request: Request) -> int:
        """Queue a request; its number. Raises what `check` does."""
        self.check(request)
        stops = self.generator.stops if request.stops is None else request.stops
        self._waiting.append(_Running(self._next, request, frozenset(stops), self.calls.device))
        self._next += 1
        return self._next - 1

    def cancel(self, number: int) -> bool:
        """Forget a request and free its row; whether there was one. Raises PeerError as `step` does."""
        found = self._forget(number)
        self._rest()
        return found

    def _forget(self, number: int) -> bool:
        for waiting in self._waiting:
            if waiting.number == number:
                self._waiting.remove(waiting)
                return True
        for row, running in enumerate(self._rows):
            if running is not None and running.number == number:
                self._leave(row)
                return True
        return False

    @torch.no_grad()
    def step(self) -> list[Made]:
        """Take one piece of a prompt, and one token of each row that generates; what was made.

        Raises:
            PeerError: another of the ranks that compute together failed, or is gone.
        """
        self.generator.programs.refresh()
        self._admit()
        decoding = [row for row in range(len(self._rows)) if self._rows[row] is not None and row not in self._filling]
        row = self._filling[0] if self._filling else NO_ROW
        piece = next(self._of(row).pieces) if row != NO_ROW else None
        if not decoding and piece is None:
            return []
        if self.leader is not None:
            self.leader.begin(self._tokens, self._places, bool(decoding), row, piece)
        made = [*self._decode(decoding), *(self._fill(row, piece) if piece is not None else ())]
        self._rest()
        return made

    def clear(self, row: int | None = None) -> None:
        """Fill a row of the cache with zeros, or all."""
        (self.leader or self.calls).clear(row)

    def close(self) -> None:
        """Let the other ranks go, once all requests are over. Raises PeerError as `step` does."""
        if self.leader is not None:
            self.leader.end()

    def _rest(self) -> None:
        """Let the other ranks wait where there is nothing to do."""
        if self.leader is not None and not self.is_busy:
            self.leader.rest()

    def _admit(self) -> None:
        """Give free rows to those that waited longest."""
        for row, running in enumerate(self._rows):
            if running is None and self._waiting:
                found = self._waiting.popleft()
                found.pieces = self.calls.pieces(found.prompt)
                self._rows[row] = found
                self._filling.append(row)

    def _fill(self, row: int, piece: Piece) -> list[Made]:
        """Take a piece of the prompt that was admitted first; behind its last piece is a token."""
        running = self._of(row)
        logits = self.calls.fill(row, *piece)
        running.num_taken += self.calls.chunk
        if running.num_taken < len(running.prompt):
            return []
        self._filling.popleft()
        self._places[row] = len(running.prompt)
        return self._chosen([row], logits[None])

    def _decode(self, rows: list[int]) -> list[Made]:
        """One more token of each of these rows."""
        if not rows:
            return []
        logits = self.calls.decode(self._tokens, self._places)
        self._places[rows] += 1
        return self._chosen(rows, logits[rows])

    def _chosen(self, rows: list[int], logits: torch.Tensor) -> list[Made]:
        """The token that each row goes on with; rows that have ended are left."""
        likeliest = logits.argmax(-1).tolist()
        is_sound = torch.isfinite(logits).all(-1).tolist()
        made = []
        for at, row in enumerate(rows):
            running = self._of(row)
            if not is_sound[at]:
                self.clear(row)
                self._leave(row)
                made.append(Made(running.number, None, "error"))
                continue
            sampling = running.request.sampling
            token = likeliest[at]
            if sampling.do_sample:
                token = int(sampling.choose(logits[at : at + 1], running.draws))
            running.num_made += 1
            is_last = running.num_made == running.request.max_new_tokens
            ended = "stop" if token in running.stops else "length" if is_last else ""
            self._tokens[row] = token
            if ended:
                self._leave(row)
            made.append(Made(running.number, token, ended))
        return made

    def _of(self, row: int) -> _Running:
        running = self._rows[row]
        assert running is not None, "the row is taken"
        return running

    def _leave(self, row: int) -> None:
        self._rows[row] = None
        self._places[row] = self.calls.max_len
        if row in self._filling:
            self._filling.remove(row)
