"""Times of steps on a GPU, from its own events; on a processor from the clock, to try the same code there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.errors import last_line
from zgraph.runtime.clock import Clock as DeviceClock


class Step(Protocol):
    """One step, which is timed. Each call does the same."""

    def __call__(self) -> Any: ...

    def results(self) -> list[Tensor]:
        """The result of one more step, to compare it with another system's; nothing where that has no meaning."""


@dataclass
class Taken:
    """Measurements of one system.

    Args:
        seconds: of each step, on the device.
        host_s: the time that the host takes to launch a step.
        peak_bytes: the most bytes alive in a step above what was before it; None on processors.
        difference: of its results from those of the first system, relative to their norm; the largest of any result.
        loss: among its results, if there is one.
        error: the last line of what stopped it.
    """

    seconds: list[float] = field(default_factory=list)
    host_s: float | None = None
    peak_bytes: int | None = None
    difference: float | None = None
    loss: float | None = None
    error: str | None = None


class Clock(DeviceClock):
    """Times steps on a device, and what memory they take.

    Args:
        device: where they run.
        is_cold: whether caches are emptied before each step, so that a step's time is the device's alone; else steps
            follow each other, and a device that waits for its host shows.
    """

    def peak_bytes(self, step: Step) -> int | None:
        if not self.on_device:
            return None
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        step()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before


def compare(
    prepares: Mapping[str, Callable[[], Step]], clock: Clock, num_warmup: int, num_rounds: int, num_steps: int
) -> dict[str, Taken]:
    """Prepare all systems, then time them in turns. One that fails drops out, and says why.

    All of them stay as they were compiled: whatever would compile once more in the rounds is an error.
    """
    found = {name: Taken() for name in prepares}
    steps: dict[str, Step] = {}
    reference: list[Tensor] = []
    for name, prepare in prepares.items():
        taken = found[name]
        with _failing_into(taken):
            step = prepare()
            for _ in range(num_warmup):
                step()
            taken.host_s = min(clock.host_s(step) for _ in range(3))
            taken.peak_bytes = clock.peak_bytes(step)
            results = step.results()
            taken.loss = next((float(r) for r in results if not r.dim()), None)
            if reference:
                taken.difference = difference(results, reference)
            else:
                reference = results
            steps[name] = step
    reference = results = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(num_rounds):
            for name, step in steps.items():
                taken = found[name]
                if taken.error is None:
                    with _failing_into(taken):
                        taken.seconds += clock.seconds(step, num_steps, taken.host_s or 0.0)
    return found


def difference(made: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest over all results of the norm of the difference over the norm."""
    pairs = ((a.float(), b.float()) for a, b in zip(made, wanted, strict=True))
    return max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs)


@contextmanager
def _failing_into(taken: Taken) -> Iterator[None]:
    """Turns an exception into the error of what is measured."""
    try:
        yield
    except Exception as error:
        taken.error = last_line(error)
