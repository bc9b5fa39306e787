"""Numbers that a device still computes, and a step of which only they say whether it counts."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from zgraph.optim.adamw import AdamW


class Later:
    """A number of a device, on its way to the host: to read it waits for nothing that is queued behind it.

    Args:
        number: of one element.
        check: called when the number has come; it raises if the number is not to be trusted.
    """

    def __init__(self, number: torch.Tensor, check: Callable[[], None] = lambda: None) -> None:
        self._number, self._event, self._check = number, None, check
        if number.is_cuda:
            self._number = number.to("cpu", non_blocking=True)  # into pinned memory, which torch takes for it
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def __float__(self) -> float:
        if self._event is not None:
            self._event.synchronize()
        self._check()
        return float(self._number)


class Undecided:
    """A step that the device leaves out if its gradients have overflowed. The host goes on as if it counted.

    Make it before the step, and call `has_stepped` after it.

    Args:
        norm: of the gradients.
        optimizer: which steps; `leaves_out` must have agreed to it.
        scheduler: stepped with it, one that `can_take_back`; None if there is none.
    """

    def __init__(self, norm: Later, optimizer: AdamW, scheduler: Any) -> None:
        self.norm, self.optimizer, self.scheduler = norm, optimizer, scheduler
        self._before = self._after = self._options()
        self._state = copy.deepcopy(scheduler.state_dict()) if scheduler is not None else None

    def _options(self) -> list[dict[str, Any]]:
        groups = self.optimizer.param_groups
        return [{key: _copied(value) for key, value in group.items() if key != "params"} for group in groups]

    def has_stepped(self) -> None:
        """Note what the optimizer's step and the scheduler's have changed: the script may change more."""
        self._after = self._options()

    def was_left_out(self) -> bool:
        """Whether the device left it out; what the host did with it is taken back then, and what the script has set
        since stays.
        """
        if math.isfinite(float(self.norm)):
            return False
        self.optimizer.take_back_step()
        now = self._options()
        if self.scheduler is not None:
            self.scheduler.load_state_dict(self._state)
        for group, before, after, held in zip(
            self.optimizer.param_groups, self._before, self._after, now, strict=False
        ):
            group.update(held)
            group.update({key: value for key, value in before.items() if _same(held.get(key), after.get(key))})
        return True


def can_take_back(scheduler: Any) -> bool:
    """Whether a step of a scheduler can be taken back."""
    return scheduler is None or (hasattr(scheduler, "state_dict") and hasattr(scheduler, "load_state_dict"))


def leaves_out(optimizer: Optimizer, norm: torch.Tensor) -> bool:
    """Have the next step of an optimizer change nothing unless this norm is finite; False if it cannot do so."""
    return isinstance(optimizer, AdamW) and optimizer.leave_out_if(~norm.isfinite())


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return bool(one is other or (type(one) is type(other) and one == other))


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
