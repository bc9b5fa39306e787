"""The two programs of a decoder over its cache: a piece of one row's prompt, and a token of each row."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import nn

from zgraph.cost.wire import traffic
from zgraph.errors import BatchMismatchError, UsageError
from zgraph.inference.decoder import Step, arguments
from zgraph.inference.programs import Program, Programs
from zgraph.inference.prompts import pieces
from zgraph.inference.slots import Arena
from zgraph.options.parallel import AXIS

CHUNK = 64
"""Tokens of a prompt that one call of the prefill takes."""


class Calls:
    """Prefill and decode of one model, and the memory that both write to.

    Args:
        model: a causal language model.
        step: a call of it.
        programs: where its programs are captured.
        arena: its cache.
        num_rows: of the cache.

    Attributes:
        num_rows, max_len: rows of the cache, and places for tokens of each.
        chunk: tokens of a prompt that one call of the prefill takes.
    """

    def __init__(self, model: nn.Module, step: Step, programs: Programs, arena: Arena, num_rows: int) -> None:
        self.programs, self.arena = programs, arena
        self.num_rows, self.max_len = num_rows, step.max_len
        self.chunk = min(CHUNK, step.max_len)
        self.device = arena.device
        self._shapes, self._several = step.shapes, dict[int, Program]()
        self._row_of = [arena.row(row) for row in range(num_rows)]

        def program(rows: int, num_tokens: int, name: str, caches: Mapping[str, torch.Tensor] | None = None) -> Program:
            return programs.program(model, step, arguments(rows, num_tokens, step, self.device), name, caches)

        self._prefill = program(1, self.chunk, "prefill")  # to another row in each call: not recorded
        self._decode = program(num_rows, 1, "decode", arena.named)

    @property
    def is_alone(self) -> bool:
        """Whether no other rank computes with this one."""
        return self.programs.session.is_alone

    @property
    def is_first(self) -> bool:
        """Whether this is the first of the ranks that compute together."""
        return self.is_alone or dist.get_rank(self.programs.ranks.axis_group(AXIS)) == 0

    @property
    def num_ranks(self) -> int:
        """Ranks that compute together."""
        return 1 if self.is_alone else dist.get_world_size(self.programs.ranks.axis_group(AXIS))

    @property
    def wire_bytes(self) -> int:
        """Bytes that a rank sends in a call of decode."""
        return sum(kind.sent_bytes for kind in traffic(self._decode.plan))

    def check_alike(self, what: str) -> None:
        """Compare what ranks that compute together were asked.

        Args:
            what: a text of all of it.

        Raises:
            BatchMismatchError: on all of them, where one was asked something else.
        """
        if self.is_alone:
            return
        word = int.from_bytes(hashlib.sha256(what.encode()).digest()[:7])
        found = torch.tensor([word, -word], device=self.device)
        group = self.programs.ranks.axis_group(AXIS)
        work = dist.all_reduce(found, dist.ReduceOp.MAX, group=group, async_op=True)
        self.programs.session.peers.wait(work, "the comparison of prompts")
        if int(found.sum()):
            raise BatchMismatchError(
                f"the ranks {dist.get_process_group_ranks(group)} compute together, but were asked to generate from "
                "other prompts, or otherwise; call them with the same prompts and options"
            )

    def of_first(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens that the first of the ranks that compute together has drawn, for all of them."""
        if self.is_alone:
            return tokens
        group, sent = self.programs.ranks.axis_group(AXIS), tokens.contiguous()
        work = dist.broadcast(sent, group_src=0, group=group, async_op=True)
        self.programs.session.peers.wait(work, "the tokens that the first rank has drawn")
        return sent

    def prefill(self, row: int, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
        """Take a prompt into a row of the cache, piece by piece.

        Args:
            row: of the cache.
            tokens: int64 [tokens], at most `max_len`.

        Yields:
            Logits of each piece's last token, fp32 [vocabulary].
        """
        for piece, places in self.pieces(tokens):
            yield self.fill(row, piece, places)

    def pieces(self, tokens: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The pieces of a prompt that `fill` takes: tokens and their places, int64 [1, chunk]."""
        return pieces(tokens, self.chunk, self.max_len)

    def fill(self, row: int, piece: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Take a piece of a prompt into a row of the cache; logits of its last token, fp32 [vocabulary]."""
        given = {"tokens": piece.to(self.device), "places": places.to(self.device), **self._row_of[row]}
        return self._prefill(given)[0][0]

    def decode(self, tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Logits behind one token of each row, fp32 [rows, vocabulary].

        Args:
            tokens: int64 [rows].
            places: int64 [rows], where they go; `max_len` for a row that has none.
        """
        (logits,) = self._decode({"tokens": tokens[:, None], "places": places[:, None], **self.arena.named})
        return logits

    def verify(self, model: nn.Module | None, tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Logits behind several tokens of each row, fp32 [rows, tokens, vocabulary].

        Args:
            model: whose calls these are: needed for the first call with so many tokens, which is captured.
            tokens, places: int64 [rows, tokens], as of `decode`.

        Raises:
            UsageError: the model is gone.
            GraphBreakError, CaptureError: the call cannot be captured.
        """
        num = tokens.shape[1]
        if num not in self._several:
            if model is None:
                raise UsageError("the model is gone, and so many tokens at once were not captured yet; keep the model")
            was_training = model.training
            model.eval()
            try:
                step = Step(model, self._shapes, self.max_len, num)
                given = arguments(self.num_rows, num, step, self.device)
                self._several[num] = self.programs.program(model, step, given, f"verify-{num}")
            finally:
                model.train(was_training)
        (logits,) = self._several[num]({"tokens": tokens, "places": places, **self.arena.named})
        return logits

    def clear(self, row: int | None = None) -> None:
        """Fill a row of the cache, or all, with zeros: what is no number would spoil what comes after."""
        for tensor in self.arena.named.values():
            (tensor if row is None else tensor[row]).zero_()
