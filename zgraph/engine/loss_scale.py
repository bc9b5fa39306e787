"""The loss scale of training in half precision (Micikevicius et al.: "Mixed precision training", 2018)."""

from __future__ import annotations

from typing import Any

from zgraph.engine.config.keys import FP16


class LossScale:
    """Factor of the loss. Halved after overflows, doubled after a number of steps without one.

    As with DeepSpeed, the first of these steps does not count.

    Args:
        keys: `fp16` of a configuration; with a `loss_scale` above zero the scale stays there.
    """

    def __init__(self, keys: FP16) -> None:
        self.keys = keys
        self.is_static = not keys.enabled or keys.loss_scale > 0
        self.scale = 1.0 if not keys.enabled else keys.loss_scale or 2.0**keys.initial_scale_power
        self.patience = keys.hysteresis
        self.step, self.last_overflow = 0, -1

    def update(self, *, overflow: bool) -> None:
        """After a step that did or did not overflow.

        Raises:
            FloatingPointError: gradients overflow though the scale is as small as it may be.
        """
        if self.is_static:
            return
        keys = self.keys
        if overflow:
            if self.patience == 1 and self.scale <= keys.min_loss_scale:
                raise FloatingPointError(
                    f"gradients overflow at the smallest loss scale, {self.scale}: lower the learning rate, or use bf16"
                )
            if self.patience == 1:
                self.scale = max(self.scale / 2, keys.min_loss_scale)
            else:
                self.patience -= 1
            self.last_overflow = self.step
        else:
            stable = self.step - self.last_overflow - 1
            ends = stable > 0 and stable % keys.loss_scale_window == 0
            if keys.consecutive_hysteresis or ends:
                self.patience = keys.hysteresis
            if ends:
                self.scale *= 2
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {"scale": self.scale, "patience": self.patience, "step": self.step, "last_overflow": self.last_overflow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint was written."""
        if not self.is_static:
            self.scale, self.patience = state["scale"], state["patience"]
            self.step, self.last_overflow = state["step"], state["last_overflow"]
