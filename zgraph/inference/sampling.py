"""From logits to tokens: the likeliest, or drawn, in the order in which transformers shapes the distribution."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zgraph.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Args:
        do_sample: draw it; else the likeliest is taken.
        temperature: what logits are divided by.
        top_k: draw from so many of the likeliest; None from all.
        top_p: draw from the fewest tokens that have this probability together; None from all.

    Raises:
        UsageError: a number is out of range, or given where nothing is drawn.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        shaped = self.temperature != 1.0 or self.top_k is not None or self.top_p is not None
        if shaped and not self.do_sample:
            raise UsageError("temperature, top_k and top_p shape what is drawn from; pass do_sample=True")
        if not self.temperature > 0:
            raise UsageError(
                f"temperature must be above 0, not {self.temperature!r}; do_sample=False is its limit at 0"
            )
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top_k must be 1 or more, not {self.top_k!r}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1, not {self.top_p!r}")

    def choose(self, logits: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """A token for each row, int64 [rows].

        Args:
            logits: [rows, vocabulary].
            generator: draws; None is torch's own.
        """
        if not self.do_sample:
            return logits.argmax(-1)
        probabilities = self.shaped(logits).softmax(-1)
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]

    def shaped(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits of the distribution that is drawn from: -inf for tokens that cannot be."""
        if self.temperature != 1.0:
            logits = logits / self.temperature
        if self.top_k is not None:
            smallest = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < smallest, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            ascending, order = logits.sort(dim=-1)
            is_tail = ascending.softmax(-1).cumsum(-1) <= 1 - self.top_p
            is_tail[:, -1] = False
            logits = logits.masked_fill(is_tail.scatter(1, order, is_tail), -torch.inf)
        return logits
