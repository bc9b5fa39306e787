"""A model for the `zgraph` command, in three lines of its own: zgraph trace examples/tiny.py:tiny --world 2"""

import torch
from torch import nn


class Tiny(nn.Module):
    """Two layers and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).relu()).square().mean()


def tiny() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The model, and what to call it with. The command calls this on the meta device."""
    return Tiny(), {"x": torch.ones(8, 64)}
