"""Speculative decoding: a small model proposes tokens, and the large one looks at all of them in one call.

Greedily, as of Leviathan, Kalman and Matias ("Fast Inference from Transformers via Speculative Decoding", ICML 2023):
those proposals are taken that the large model's own choices agree with, and its choice behind them. Places of the cache
behind a refused proposal are written anew before they are seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from zgraph.inference.calls import Calls

Verify = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From tokens and places, int64 [rows, tokens], to logits behind each, fp32 [rows, tokens, vocabulary]."""


@dataclass
class Drafted:
    """Counts of one call.

    Args:
        num_proposed: tokens that the draft proposed, for rows that had not ended.
        num_accepted: those of them that were taken.
    """

    num_proposed: int = 0
    num_accepted: int = 0

    @property
    def acceptance(self) -> float:
        """The part of the proposals that was taken."""
        return self.num_accepted / self.num_proposed if self.num_proposed else 0.0


def proposed(draft: Calls, last: torch.Tensor, places: torch.Tensor, num: int) -> torch.Tensor:
    """The tokens that a draft goes on with, int64 [rows, num], with keys and values of the last of them in its cache.

    Args:
        draft: its calls.
        last: int64 [rows], the last token of each row.
        places: int64 [rows, num + 1], where these and the proposals go.
        num: of proposals.
    """
    found, rows = [last], len(last)
    tokens = torch.zeros(draft.num_rows, dtype=torch.int64, device=draft.device)
    at = torch.full_like(tokens, draft.max_len)
    for step in range(num + 1):
        tokens[:rows], at[:rows] = found[-1], places[:, step]
        found.append(draft.decode(tokens, at)[:rows].argmax(-1))
    return torch.stack(found[1 : num + 1], 1)


def speculated(
    calls: Calls,
    verify: Verify,
    draft: Calls,
    first: Sequence[int],
    lengths: Sequence[int],
    num_steps: int,
    stops: Sequence[int],
    counts: Drafted,
    num: int,
) -> Iterator[list[int | None]]:
    """The tokens of each row, one step after the other; None for a row that has ended.

    Args:
        calls: of the large model.
        verify: its call for all proposals; the rest as of `proposed`.
        draft: calls of the small one. Both have the prompts in their caches.
        first: the first token behind each prompt.
        lengths: of the prompts.
        num_steps: tokens of each row at most.
        stops: tokens that end a row.
        counts: of proposals, to add to.
        num: proposals in each round.
    """
    made, ends, device = [[token] for token in first], {*stops}, calls.device
    given = 0

    def has_ended(row: list[int]) -> bool:
        return row[-1] in ends or len(row) >= num_steps

    while True:
        while given < num_steps and all(len(row) > given or has_ended(row) for row in made):
            if all(len(row) <= given for row in made):
                return
            yield [row[given] if len(row) > given else None for row in made]
            given += 1
        if all(map(has_ended, made)):
            return
        last = torch.tensor([row[-1] for row in made], device=device)
        begin = torch.tensor([n + len(row) - 1 for n, row in zip(lengths, made, strict=True)], device=device)
        ended = torch.tensor([*map(has_ended, made)], device=device)
        ahead = begin[:, None] + torch.arange(num + 1, device=device)

        def within(max_len: int, ahead: torch.Tensor = ahead, ended: torch.Tensor = ended) -> torch.Tensor:
            return torch.where((ahead < max_len) & ~ended[:, None], ahead, max_len)

        guesses = proposed(draft, last, within(draft.max_len), num)
        tokens = torch.zeros(calls.num_rows, num + 1, dtype=torch.int64, device=device)
        places = torch.full_like(tokens, calls.max_len)
        tokens[: len(made), 0], tokens[: len(made), 1:] = last, guesses
        places[: len(made)] = within(calls.max_len)
        own = verify(tokens, places)[: len(made)].argmax(-1)
        agreed = (own[:, :num] == guesses).long().cumprod(1).sum(1).tolist()
        for row, choices, right in zip(made, own.tolist(), agreed, strict=True):
            if has_ended(row):
                continue
            counts.num_proposed, counts.num_accepted = counts.num_proposed + num, counts.num_accepted + right
            for token in choices[: right + 1]:
                if not has_ended(row):
                    row.append(token)
