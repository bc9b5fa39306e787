"""Learning rates by the number of the step, as DeepSpeed's schedulers of the same names give them.

`WarmupLR` and its kin rise from a minimum to the rate of the group and then stay, fall in a line, or as a cosine.
`OneCycle` and `LRRangeTest` are of Smith: "A disciplined approach to neural network hyper-parameters", 2018.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch.optim import Optimizer

from zgraph.engine.config.sections import Section
from zgraph.errors import UsageError

Rates = float | tuple[float, ...]


class Schedule(Section):
    """Learning rates of each step; steps are counted from 0, and -1 is before the first."""

    @abstractmethod
    def rates(self, step: int, base: Sequence[float]) -> list[float]:
        """The rate of each group, whose own are `base`."""

    def momenta(self, step: int) -> float | None:
        """The momentum of all groups; None leaves it to the optimizer."""
        return None

    def first_momentum(self) -> float | None:
        """That of the groups before the first step."""
        return self.momenta(-1)


def _each(rates: Rates, count: int) -> list[float]:
    """A rate for each group. Raises UsageError if there are others than groups."""
    if not isinstance(rates, tuple):
        return [rates] * count
    if len(rates) != count:
        raise UsageError(f"the scheduler has {len(rates)} rates for {count} groups of parameters: give one, or {count}")
    return list(rates)


class Warmup(Schedule):
    """The rise of all schedules that begin with one."""

    warmup_num_steps: PositiveInt = 1000
    warmup_type: Literal["log", "linear"] = "log"

    @property
    def num_steps(self) -> int:
        return max(2, self.warmup_num_steps)

    def risen(self, step: int) -> float:
        """How far the rate has risen, from 0 to 1."""
        if step >= self.num_steps:
            return 1.0
        return math.log(step + 1) / math.log(self.num_steps) if self.warmup_type == "log" else step / self.num_steps


class WarmupLR(Warmup):
    """Rises to `warmup_max_lr` (by default the group's own rate), and stays."""

    warmup_min_lr: Rates = 0.0
    warmup_max_lr: Rates | None = None

    def rates(self, step: int, base: Sequence[float]) -> list[float]:
        low = _each(self.warmup_min_lr, len(base))
        high = list(base) if self.warmup_max_lr is None else _each(self.warmup_max_lr, len(base))
        share = self.share(step) if step >= 0 else 0.0
        return [a + (b - a) * share for a, b in zip(low, high, strict=True)]

    def share(self, step: int) -> float:
        """Where between the two rates a step stands."""
        return self.risen(step)


class WarmupDecayLR(WarmupLR):
    """Rises, then falls in a line, to the minimum at `total_num_steps`."""

    total_num_steps: PositiveInt
    warmup_max_lr: Rates | None = 0.001

    def share(self, step: int) -> float:
        if step < self.num_steps:
            return self.risen(step)
        return max(0.0, (self.total_num_steps - step) / max(1.0, self.total_num_steps - self.num_steps))


class WarmupCosineLR(Warmup):
    """Rises from a share of the group's rate, then falls as a cosine to `cos_min_ratio` of it."""

    total_num_steps: PositiveInt
    warmup_min_ratio: NonNegativeFloat = 0.0
    cos_min_ratio: NonNegativeFloat = 0.0001

    def rates(self, step: int, base: Sequence[float]) -> list[float]:
        return [rate * self.ratio(step) for rate in base]

    def ratio(self, step: int) -> float:
        if step < 0:
            return 0.0
        if step < self.num_steps:
            return self.warmup_min_ratio + (1 - self.warmup_min_ratio) * self.risen(step)
        done = (step - self.num_steps + 1) / max(1, self.total_num_steps - self.num_steps)
        return self.cos_min_ratio + (1 - self.cos_min_ratio) * (1 + math.cos(math.pi * min(1.0, done))) / 2


class LRRangeTest(Schedule):
    """Rises without end, to find the rate at which training breaks."""

    lr_range_test_min_lr: Rates = 1e-3
    lr_range_test_step_size: PositiveInt = 2000
    lr_range_test_step_rate: float = 1.0
    lr_range_test_staircase: bool = False

    def rates(self, step: int, base: Sequence[float]) -> list[float]:
        interval = (step + 1) / self.lr_range_test_step_size
        interval = math.floor(interval) if self.lr_range_test_staircase else interval
        return [r * (1 + self.lr_range_test_step_rate * interval) for r in _each(self.lr_range_test_min_lr, len(base))]


class OneCycle(Schedule):
    """One rise and one fall, with the momentum the other way round, then a slow decay."""

    cycle_min_lr: Rates
    cycle_max_lr: Rates
    decay_lr_rate: float = 0.0
    cycle_first_step_size: PositiveInt = 2000
    cycle_second_step_size: NonNegativeInt | None = None
    cycle_first_stair_count: NonNegativeInt = 0
    cycle_second_stair_count: NonNegativeInt | None = None
    decay_step_size: NonNegativeInt = 0
    cycle_momentum: bool = True
    cycle_min_mom: float = Field(0.8, ge=0, lt=1)
    cycle_max_mom: float = Field(0.9, ge=0, lt=1)
    decay_mom_rate: float = 0.0

    @property
    def second(self) -> int:
        return self.cycle_first_step_size if self.cycle_second_step_size is None else self.cycle_second_step_size

    @property
    def num_steps(self) -> int:
        return self.cycle_first_step_size + self.second

    def rates(self, step: int, base: Sequence[float]) -> list[float]:
        low, high = (_each(rates, len(base)) for rates in (self.cycle_min_lr, self.cycle_max_lr))
        if step < 0:
            return low
        if step < self.num_steps:
            return [a + (b - a) * self.height(step) for a, b in zip(low, high, strict=True)]
        return [rate / self.decay(step, self.decay_lr_rate) for rate in low]

    def momenta(self, step: int) -> float | None:
        if not self.cycle_momentum:
            return None
        if step < self.num_steps:
            return self.cycle_max_mom - (self.cycle_max_mom - self.cycle_min_mom) * self.height(step)
        return self.cycle_max_mom * self.decay(step, self.decay_mom_rate)

    def first_momentum(self) -> float | None:
        return self.cycle_min_mom if self.cycle_momentum else None

    def height(self, step: int) -> float:
        """How high on the cycle a step stands: 1 at its top. With stairs, on the last one that was reached."""
        at = (step + 1) % self.num_steps
        rises = at <= self.cycle_first_step_size
        stairs = self.cycle_first_stair_count
        if not rises and self.cycle_second_stair_count is not None:
            stairs = self.cycle_second_stair_count
        up, long = (at, self.cycle_first_step_size) if rises else (self.num_steps - at, self.second)
        return math.floor(up * stairs / long) / stairs if stairs else up / long

    def decay(self, step: int, rate: float) -> float:
        if not self.decay_step_size:
            return 1.0
        return 1 + rate * (step - self.num_steps + 1) / self.decay_step_size


SCHEDULES: dict[str, type[Schedule]] = {
    kind.__name__: kind for kind in (WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest)
}


class Scheduler:
    """Sets the rates of an optimizer, step by step.

    Args:
        optimizer: its groups' rates at this moment are those that a schedule rises to.
        schedule: the rates of each step.
    """

    def __init__(self, optimizer: Optimizer, schedule: Schedule) -> None:
        self.optimizer, self.schedule = optimizer, schedule
        self.base = [float(group["lr"]) for group in optimizer.param_groups]
        self.last_batch_iteration = -1
        self._set(schedule.rates(-1, self.base))

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Go on to the next step, or to the one given."""
        done = self.last_batch_iteration + 1 if last_batch_iteration is None else last_batch_iteration
        self.last_batch_iteration = done
        self._set(self.schedule.rates(done, self.base))

    def _set(self, rates: Sequence[float]) -> None:
        done = self.last_batch_iteration
        momentum = self.schedule.momenta(done) if done >= 0 else self.schedule.first_momentum()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
            if momentum is not None and "betas" in group:
                group["betas"] = (momentum, 0.99)
        self._last = list(rates)

    def get_lr(self) -> list[float]:
        """The rate of each group in the step that is next."""
        return list(self._last)

    get_last_lr = get_lr

    def get_mom(self) -> list[tuple[float, float]] | None:
        """The betas that the schedule has for each group now; None where it leaves them to the optimizer.

        Before the first step the groups have others, as with DeepSpeed: the cycle's smallest momentum.
        """
        momentum = self.schedule.momenta(self.last_batch_iteration)
        if momentum is None:
            return None
        return [(momentum, 0.99) for group in self.optimizer.param_groups if "betas" in group]

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {"last_batch_iteration": self.last_batch_iteration, "base": self.base}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint was written."""
        self.base = list(state.get("base", self.base))
        self.step(state["last_batch_iteration"])
