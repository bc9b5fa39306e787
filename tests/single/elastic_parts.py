"""A model and a state for tests of elastic replicas."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


class Held:
    """A state, which refuses some."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> Any:
        return {"value": self.value}

    def load_state_dict(self, state: Any) -> None:
        self.value = state["value"]
        if self.value == "bad":
            raise AttributeError("not this one")
