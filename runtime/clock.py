"""Clock for work on a device: events on its stream, so that what is timed is the device and not the host's launches."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import repeat
from typing import Any

import torch

COLD_BYTES = 512 << 20
"""Bytes written over between runs, so that caches hold nothing of theirs: twice the largest cache of a GPU."""

FEWEST_COLD_BYTES = 32 << 20
"""Where memory is short, fewer bytes are written over, but never fewer than these."""


class Clock:
    """Times work on a device. On a processor it is the host's clock.

    Args:
        device: where the work runs.
        is_cold: whether the device writes over other memory before each run. It is then busy for longer than the host
            takes to launch the run, so that the time is the device's alone, and its caches hold nothing of the run's.
            Else runs follow each other, and a device that waits for its host shows.

    Raises:
        torch.OutOfMemoryError: the device has no room for the memory to write over.
    """

    def __init__(self, device: torch.device, *, is_cold: bool) -> None:
        self.device, self.on_device = device, device.type != "cpu"
        self.is_cold = is_cold and self.on_device
        if self.is_cold:
            self._cold = _room(device)
            self._cooling_s = min(self._seconds(self._cold.zero_, 6)[1:])

    def host_s(self, run: Callable[[], Any], num_runs: int = 1) -> float:
        """Seconds that the host takes to launch a run, the mean of so many. It is free to run ahead of the device."""
        self.synchronize()
        began = time.perf_counter()
        for _ in repeat(None, num_runs):
            run()
        return (time.perf_counter() - began) / num_runs

    def seconds(
        self, run: Callable[[], Any], num_times: int, host_s: float = 0.0, num_in_a_row: int = 1
    ) -> list[float]:
        """Seconds of a run, taken so many times.

        Args:
            run: launches the work.
            num_times: measurements.
            host_s: seconds in which the host launches one run.
            num_in_a_row: runs between two looks at the clock, whose mean is taken.
        """
        if not self.on_device:
            return [self.host_s(run, num_in_a_row) for _ in range(num_times)]
        num_coolings = 1 + int(2 * host_s * num_in_a_row / self._cooling_s) if self.is_cold else 0
        return self._seconds(run, num_times, num_in_a_row, num_coolings)

    def _seconds(
        self, run: Callable[[], Any], num_times: int, num_in_a_row: int = 1, num_coolings: int = 0
    ) -> list[float]:
        events = [[torch.Event(device=self.device, enable_timing=True) for _ in range(2)] for _ in range(num_times)]
        self.synchronize()
        for begin, end in events:
            for _ in range(num_coolings):
                self._cold.zero_()
            stream = torch.cuda.current_stream(self.device)
            begin.record(stream)
            for _ in repeat(None, num_in_a_row):
                run()
            end.record(stream)
        self.synchronize()
        return [float(begin.elapsed_time(end)) / 1e3 / num_in_a_row for begin, end in events]

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.on_device:
            torch.cuda.synchronize(self.device)


def _room(device: torch.device) -> torch.Tensor:
    """Memory to write over, as much as there is room for."""
    num_bytes = COLD_BYTES
    while True:
        try:
            return torch.empty(num_bytes, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError:
            if num_bytes == FEWEST_COLD_BYTES:
                raise
            num_bytes //= 2
