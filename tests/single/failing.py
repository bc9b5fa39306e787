"""A model whose forward fails as it is told. It stands apart, where pytest leaves its assertions as they are."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn


class OwnError(Exception):
    """Made of more than a text."""

    def __init__(self, given: torch.Tensor, count: int) -> None:
        super().__init__(f"{count} of {tuple(given.shape)}")
        self.given = given


class Failing(nn.Module):
    """Fails as it is told."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(()))
        self.how, self.calls = how, 0

    def forward(self, x: torch.Tensor, y: Any = None) -> torch.Tensor:
        self.calls += 1
        self.seen += 1
        hidden = self.layer(x)
        if self.how == "raise":
            raise ValueError("the user's own error")  # raise
        if self.how == "own class":
            raise OwnError(x, 3)  # own class
        if self.how == "cause":
            try:
                raise AttributeError("inner")
            except AttributeError as error:
                raise LookupError("outer") from error  # cause
        if self.how == "key":
            return {"a": hidden}["b"]  # key
        if self.how == "shapes":
            return hidden @ torch.ones(3, 3)  # shapes
        if self.how == "none":
            return hidden + y  # none
        if self.how == "index":
            return hidden[7]  # index
        if self.how == "assert":
            assert len(x) == 9, "nine"  # assert
        if self.how == "branch" and hidden.sum() > 0:  # branch
            return hidden
        if self.how == "write":
            sys.stdout.write("seen")  # write
        return hidden.sum()
