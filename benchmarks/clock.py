"""Times of steps on a GPU, from its own events; on a processor from the clock, to try the same code there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


class Step(Protocol):
    """One step, which is timed. Each call does the same."""

    def __call__(self) -> Any: ...

    def results(self) -> list[Tensor]:
        """The result of one more step, to compare it with another system's; nothing where that has no meaning."""


COLD_BYTES = 512 << 20
"""Bytes written over between steps, so that caches hold nothing of theirs: twice the largest cache of a GPU."""


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


class Clock:
    """Times steps on a device.

    Args:
        device: where they run.
        is_cold: whether caches are emptied before each step. The device is then busy with that for longer than the host
            takes to launch the step, so that a step's time is the device's alone; else steps follow each other, and
            a device that waits for its host shows.
    """

    def __init__(self, device: torch.device, *, is_cold: bool) -> None:
        self.device, self.is_cold = device, is_cold and device.type == "cuda"
        if self.is_cold:
            self._cold = torch.empty(COLD_BYTES, dtype=torch.int8, device=device)
            self._cooling_s = self._seconds(self._cold.zero_, 6)[-1]

    def host_s(self, step: Callable[[], Any]) -> float:
        """Seconds until the host has launched a step. It is free to run ahead of the device."""
        self.synchronize()
        began = time.perf_counter()
        step()
        return time.perf_counter() - began

    def peak_bytes(self, step: Step) -> int | None:
        if self.device.type != "cuda":
            return None
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        step()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    def seconds(self, step: Step, num_steps: int, host_s: float) -> list[float]:
        """Seconds of each of so many steps, of which the host launches one in `host_s`."""
        if self.device.type != "cuda":
            return [self.host_s(step) for _ in range(num_steps)]
        num_coolings = 1 + int(2 * host_s / self._cooling_s) if self.is_cold else 0
        return self._seconds(step, num_steps, num_coolings)

    def _seconds(self, step: Callable[[], Any], num_steps: int, num_coolings: int = 0) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(num_steps)]  # type: ignore[no-untyped-call]
        self.synchronize()
        for begin, end in events:
            for _ in range(num_coolings):
                self._cold.zero_()
            begin.record()
            step()
            end.record()
        self.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in events]

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


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


def last_line(error: BaseException) -> str:
    """The last line of an exception's words, behind its type."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1].strip()}"
