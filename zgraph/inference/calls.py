"""The two programs of a decoder over its cache: a piece of one row's prompt, and a token of each row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from zgraph.inference.decoder import Step, arguments
from zgraph.inference.programs import Program, Programs
from zgraph.inference.prompts import pieces
from zgraph.inference.slots import Arena

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
        self.device = arena.tensors[0].device
        self._cache = _named(arena.tensors)
        self._row_of = [_named([t[row : row + 1] for t in arena.tensors]) for row in range(num_rows)]

        def program(rows: int, num_tokens: int, name: str) -> Program:
            return programs.program(model, step, arguments(rows, num_tokens, step, self.device), name)

        self._prefill, self._decode = program(1, self.chunk, "prefill"), program(num_rows, 1, "decode")

    def prefill(self, row: int, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
        """Take a prompt into a row of the cache, piece by piece.

        Args:
            row: of the cache.
            tokens: int64 [tokens], at most `max_len`.

        Yields:
            Logits of each piece's last token, fp32 [vocabulary].
        """
        for piece, places in pieces(tokens, self.chunk, self.max_len):
            given = {"tokens": piece.to(self.device), "places": places.to(self.device), **self._row_of[row]}
            yield self._prefill(given)[0][0]

    def decode(self, tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Logits behind one token of each row, fp32 [rows, vocabulary].

        Args:
            tokens: int64 [rows].
            places: int64 [rows], where they go; `max_len` for a row that has none.
        """
        (logits,) = self._decode({"tokens": tokens[:, None], "places": places[:, None], **self._cache})
        return logits

    def clear(self, row: int | None = None) -> None:
        """Fill a row of the cache, or all, with zeros: what is no number would spoil what comes after."""
        for tensor in self.arena.tensors:
            (tensor if row is None else tensor[row]).zero_()


def _named(tensors: list[torch.Tensor]) -> Mapping[str, torch.Tensor]:
    return {f"cache.{n // 2}.{'values' if n % 2 else 'keys'}": tensor for n, tensor in enumerate(tensors)}
