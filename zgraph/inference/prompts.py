"""Prompts of different lengths without their padding, and pieces of one size of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from zgraph.errors import UsageError


class Prompts:
    """The tokens of each row.

    Args:
        input_ids: int64 [rows, tokens], padded on the left.
        attention_mask: [rows, tokens], 0 for padding; None where there is none.
        num_tokens: of the vocabulary.

    Raises:
        UsageError: they are no such tensors, a row has no token or ends with padding, or a token is none of the
            vocabulary.
    """

    def __init__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, num_tokens: int) -> None:
        if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2 or not input_ids.numel():
            raise UsageError("input_ids is a tensor of tokens, [rows, tokens], with one of each at least")
        if input_ids.is_floating_point() or input_ids.dtype is torch.bool:
            raise UsageError(f"input_ids are integers, not {input_ids.dtype}")
        self.device = input_ids.device
        ids = input_ids.detach().cpu().long()
        keep = torch.ones_like(ids, dtype=torch.bool)
        if attention_mask is not None:
            if attention_mask.shape != input_ids.shape:
                raise UsageError(
                    f"attention_mask is {tuple(attention_mask.shape)}, and input_ids {tuple(input_ids.shape)}; they "
                    "have one entry for each token"
                )
            keep = attention_mask.detach().cpu() != 0
        if not bool(keep[:, -1].all()):
            raise UsageError('a row ends with padding; pad prompts on the left (tokenizer.padding_side = "left")')
        self.rows = [row[kept] for row, kept in zip(ids, keep, strict=True)]
        self.lengths = [len(row) for row in self.rows]
        used = ids[keep]
        if int(used.min()) < 0 or int(used.max()) >= num_tokens:
            raise UsageError(f"input_ids has a token outside of 0 to {num_tokens - 1}, the model's vocabulary")

    @property
    def listed(self) -> list[list[int]]:
        """The tokens of each row, as numbers."""
        return [row.tolist() for row in self.rows]

    @property
    def num_rows(self) -> int:
        """How many prompts there are."""
        return len(self.rows)


def pieces(tokens: torch.Tensor, size: int, nowhere: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pieces of one prompt, its last token at the end of the last piece.

    Args:
        tokens: int64 [tokens], one at least.
        size: tokens of a piece.
        nowhere: the place of what is no token: what fills the first piece.

    Yields:
        Tokens and their places, int64 [1, size].
    """
    num_tokens = len(tokens)
    whole = torch.zeros(1, -(-num_tokens // size) * size, dtype=torch.int64)
    places = torch.full_like(whole, nowhere)
    whole[0, -num_tokens:] = tokens
    places[0, -num_tokens:] = torch.arange(num_tokens)
    yield from zip(torch.split(whole, size, 1), torch.split(places, size, 1), strict=True)
