"""Cases of training on the emulated device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """A net, how it is compiled, and how it is trained.

    Args:
        net: its name, see `nets`.
        options: for `zgraph.compile`.
        num_shards: ranks that hold the shards of a copy of the model.
        num_copies: copies of the model; with more than one, the mesh has two axes.
        num_micro_steps: a step's, all but the last without sync.
        syncs: whether the last is with sync; else the optimizer's step averages gradients.
        evaluates: whether the model is called without gradients before each update.
        num_steps: steps.
        num_rows: of a batch.
        optimizer: options for `zgraph.optim.AdamW`; None takes torch's.
    """

    net: str = "residual"
    options: dict[str, Any] = field(default_factory=dict)
    num_shards: int = 4
    num_copies: int = 1
    num_micro_steps: int = 1
    syncs: bool = True
    evaluates: bool = False
    num_steps: int = 3
    num_rows: int = 16
    optimizer: dict[str, Any] | None = None

    rate = 1e-2

    @staticmethod
    def seed(step: int, micro: int) -> int:
        """Of a batch."""
        return 100 * step + micro

    @property
    def is_exact(self) -> bool:
        """Whether losses are those of fp32."""
        return not self.options.get("param_dtype") and not self.options.get("compress")
