"""Measures how long each instruction of a program takes on the device at hand."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Protocol

import torch

from zgraph.ir import Instruction, Node
from zgraph.runtime.stretches import Part, Stretch


class Watcher(Protocol):
    """Who is told how a program goes on. If it takes regions apart, they are run op by op."""

    takes_apart: bool

    def begin(self, parts: Sequence[Part | Stretch]) -> None: ...

    def mark(self) -> None: ...

    def __hash__(self) -> int: ...


class Recorder:
    """Collects the time between an instruction and the one before it, run by run.

    Args:
        device: where the program runs. On a GPU, events on its stream are compared after the step. They are all there
            before the program begins, so that none is made between two instructions.
    """

    takes_apart = True

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type != "cpu"
        self._runs: list[tuple[Sequence[Part | Stretch], Sequence[int | torch.Event]]] = []
        self._mark: Callable[[], None] = lambda: None

    def begin(self, parts: Sequence[Part | Stretch]) -> None:
        """A program begins."""
        if self.on_gpu:
            marked: list[torch.Event] = []
            left = iter([self._event() for _ in range(len(parts) + 1)])
            stream = torch.cuda.current_stream(self.device)

            def mark() -> None:
                event = next(left)
                event.record(stream)
                marked.append(event)

            self._mark = mark
            self._runs.append((parts, marked))
        else:
            times: list[int] = []
            self._mark = lambda: times.append(time.perf_counter_ns())
            self._runs.append((parts, times))
        self.mark()

    def mark(self) -> None:
        """An instruction is done."""
        self._mark()

    def _event(self) -> torch.Event:
        """An event, which has been recorded once: the driver makes it then."""
        event = torch.Event(device=self.device, enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def means_us(self) -> list[tuple[Node, float]]:
        """Each instruction of every recorded program, with its mean time over the runs."""
        taken: dict[int, list[float]] = defaultdict(list)
        nodes: dict[int, Node] = {}
        for spans in self.runs_us():
            for instruction, begin, end in spans:
                taken[id(instruction)].append(end - begin)
                nodes[id(instruction)] = instruction.node
        return [(nodes[key], fmean(found)) for key, found in taken.items()]

    def runs_us(self) -> list[list[tuple[Instruction, float, float]]]:
        """Of each run the instructions, with their begin and end in microseconds from the run's begin."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
        found = []
        for parts, times in self._runs:
            spans = []
            for instruction, before, after in zip(parts, times, times[1:], strict=False):
                assert isinstance(instruction, Instruction)
                spans.append((instruction, _us(times[0], before), _us(times[0], after)))
            found.append(spans)
        return found

    def clear(self) -> None:
        """Forget all runs."""
        self._runs.clear()


def _us(before: int | torch.Event, after: int | torch.Event) -> float:
    if isinstance(before, int) and isinstance(after, int):
        return (after - before) / 1e3
    assert isinstance(before, torch.Event)
    return 1e3 * before.elapsed_time(after)  # type: ignore[arg-type]
