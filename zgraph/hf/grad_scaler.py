"""torch's `GradScaler`, as far as an Accelerator asks it, over the loss scale of the engine and sharded gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.optim import Optimizer

from zgraph.engine.config.keys import FP16
from zgraph.engine.gradients import Gradients
from zgraph.engine.loss_scale import LossScale


class Scaler:
    """Scales losses, takes the scale off gradients, and leaves out steps in which they overflow on any rank.

    Args:
        keys: `fp16` of a configuration.
    """

    def __init__(self, keys: FP16) -> None:
        self.loss_scale = LossScale(keys)
        self._norm: float | None = None

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss to call `backward` on."""
        return loss.float() * self.loss_scale.scale

    def unscale_(self, optimizer: Optimizer) -> float:
        """Take the scale off the gradients, once in a step; their norm without it."""
        if self._norm is None:
            gradients = Gradients(p for group in optimizer.param_groups for p in group["params"])
            self._norm = float(gradients.norm()) / self.loss_scale.scale
            gradients.scale(1 / self.loss_scale.scale)
        return self._norm

    def step(self, optimizer: Optimizer, closure: Any = None) -> None:
        """The optimizer's step, if nothing has overflowed."""
        if math.isfinite(self.unscale_(optimizer)):
            optimizer.step(closure)

    def update(self) -> None:
        """End the step."""
        assert self._norm is not None
        self.loss_scale.update(overflow=not math.isfinite(self._norm))
        self._norm = None

    def get_scale(self) -> float:
        """The factor of the loss."""
        return self.loss_scale.scale

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return self.loss_scale.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint was written."""
        self.loss_scale.load_state_dict(state)
