"""Makes a mistake on purpose, and tells what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zgraph.errors import ZgraphError

from .lockstep import local, loss_of

LIMIT_S = 10


@dataclass(frozen=True)
class Caught:
    """What one rank saw.

    Args:
        error: the error's class.
        message: its text, and its notes.
        seconds: until it came.
        untouched: whether the model holds the same parameters as before, with the same values, in memory.
        recovered: whether the right call worked afterwards; None if none was tried.
    """

    error: type[Exception]
    message: str
    seconds: float
    untouched: bool
    recovered: bool | None = None


def make(
    model: nn.Module,
    mistake: Callable[[], Any],
    then: Callable[[], Any] | None = None,
    kind: type[Exception] | tuple[type[Exception], ...] = ZgraphError,
) -> Caught:
    """Make a mistake with a model, which must raise one of zgraph's errors, or of these.

    Args:
        model: looked at before and after.
        mistake: what must raise.
        then: the right thing, which must work afterwards.
        kind: what else may be raised.
    """
    before = {n: (p, local(p).detach().clone()) for n, p in model.named_parameters()}
    began = time.monotonic()
    try:
        mistake()
    except kind as error:
        caught = error
    else:
        raise AssertionError("nothing was raised")
    seconds = time.monotonic() - began
    untouched = all(_same(p, *before[n]) for n, p in model.named_parameters())
    if then is not None:
        then()
    said = "\n".join([str(caught), *getattr(caught, "__notes__", ())])
    return Caught(type(caught), said, seconds, untouched, None if then is None else True)


def _same(now: torch.Tensor, before: torch.Tensor, values: torch.Tensor) -> bool:
    held = local(now).detach()
    in_memory = held.untyped_storage().nbytes() >= values.numel() * values.element_size()
    return now is before and in_memory and torch.equal(held, values)


def train_once(model: nn.Module, inputs: Any) -> None:
    """A step that must work: every parameter that is used gets a gradient."""
    model.zero_grad()
    loss_of(model, inputs).backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing, f"no gradient of {missing}"


def assert_caught(answers: Sequence[Caught], error: type[Exception], *words: str, limit_s: float = LIMIT_S) -> None:
    """Every rank saw this error in time, with these words in its message, and its model is left as it was."""
    for rank, caught in enumerate(answers):
        where = f"on rank {rank}: {caught.error.__name__}: {caught.message}"
        assert caught.error is error, where
        for word in words:
            assert word in caught.message, f"{word!r} is not said {where}"
        assert caught.seconds < limit_s, f"it took {caught.seconds:.1f} s {where}"
        assert caught.untouched, f"the parameters have changed {where}"
