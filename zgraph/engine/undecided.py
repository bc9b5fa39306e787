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

    Args:
        norm: of the gradients.
        optimizer: which steps; `leaves_out` must have agreed to it.
        scheduler: stepped with it; None if there is none.
    """

    def __init__(self, norm: Later, optimizer: AdamW, scheduler: Any) -> None:
        self.norm, self.optimizer, self.scheduler = norm, optimizer, scheduler
        self._groups = [{k: _copied(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        self._state = copy.deepcopy(scheduler.state_dict()) if scheduler is not None else None

    def was_left_out(self) -> bool:
        """Whether the device left it out; what the host did with it is taken back then."""
        if math.isfinite(float(self.norm)):
            return False
        self.optimizer.take_back_step()
        if self.scheduler is not None:
            self.scheduler.load_state_dict(self._state)
        for group, before in zip(self.optimizer.param_groups, self._groups, strict=True):
            group.update(before)
        return True


def leaves_out(optimizer: Optimizer, norm: torch.Tensor) -> bool:
    """Have the next step of an optimizer change nothing unless this norm is finite; False if it cannot do so."""
    return isinstance(optimizer, AdamW) and optimizer.leave_out_if(~norm.isfinite())


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
