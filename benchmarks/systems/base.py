"""A system under measurement: a name, a stage, and a function that makes a model train its way."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from benchmarks.errors import NotInstalled

LEARNING_RATE = 1e-3

Step = Callable[[Tensor], Tensor]
"""One training step on a batch of token ids, from forward to cleared gradients. Returns the detached loss."""


@dataclass(frozen=True)
class Outlook:
    """A system's own prediction of its step, and the part of it that only it can measure.

    step_s: predicted, optimizer included.
    exposed_s: predicted time that computing waits for communication.
    measured_exposed_s: the same as it came.
    gap: how much longer the predicted step is than the lower bound of its schedule.
    peak_bytes: predicted, with all that lies at rest.
    """

    step_s: float
    exposed_s: float
    measured_exposed_s: float
    gap: float
    peak_bytes: int


class Role(StrEnum):
    """Sizes that a system is measured at."""

    ZGRAPH = "zgraph"
    BASELINE = "peer"
    COMPUTE = "compute"
    """The work of one rank with nothing sent: the floor under everybody's step."""


@dataclass(frozen=True)
class System:
    """One row of the benchmark.

    stage: the ZeRO stage it amounts to (0: nothing sharded, 3: parameters too).
    predicts: whether its step has an `outlook`.
    prepare: takes the whole model, the same on every rank and on its device already, and returns the step.
        The process group is up by then, except for the role COMPUTE.
    needs: the package it imports; `extra` is how one installs it.
    """

    name: str
    role: Role
    stage: int
    prepare: Callable[[nn.Module, torch.device], Step]
    needs: str = "torch"
    extra: str = "torch"
    predicts: bool = False

    @property
    def is_distributed(self) -> bool:
        return self.role is not Role.COMPUTE

    def require(self) -> None:
        """Raises NotInstalled if its package is not importable."""
        if importlib.util.find_spec(self.needs) is None:
            raise NotInstalled("not installed", f"pip install {self.extra}")


def adamw_step(model: nn.Module) -> Step:
    """The plain PyTorch training step, for every system that lets one write it."""
    return step_of(model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE))


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """The plain PyTorch training step with this optimizer."""

    def step(tokens: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=tokens, labels=tokens).loss
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step
