"""The progress of training runs: bars on a terminal, a line now and then in a log."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

NUM_LINES = 5
"""Lines that a run writes into a log."""


@dataclass(frozen=True)
class Started:
    """A run begins."""

    name: str
    num_steps: int


@dataclass(frozen=True)
class Stepped:
    """A step ended, with the first rank's loss and the tokens that all ranks together take in a second."""

    loss: float
    tokens_per_s: float


class Display:
    """Shows one run after the other.

    Args:
        console: where to. Bars move only on a terminal that can move its cursor.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._is_live = console.is_terminal and not console.is_dumb_terminal
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            console=console,
            expand=True,
        )
        self._task = TaskID(0)
        self._name, self._step, self._num_steps = "", 0, 0

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        if self._is_live:
            self._bars.stop()

    def print(self, text: str) -> None:
        """Print above the bars."""
        self._console.print(text, highlight=False)

    def show(self, event: Started | Stepped) -> None:
        """Show what happened."""
        if isinstance(event, Started):
            self._start(event)
        else:
            self._advance(event)

    def _start(self, event: Started) -> None:
        self._name, self._step, self._num_steps = event.name, 0, event.num_steps
        if self._is_live:
            self._bars.start()  # not earlier: without a task it would print empty lines
            self._task = self._bars.add_task(event.name, total=event.num_steps, figures="first step ...")

    def _advance(self, event: Stepped) -> None:
        self._step += 1
        figures = f"loss {event.loss:.3f}"
        if event.tokens_per_s:
            figures += f"  {event.tokens_per_s:,.0f} tokens/s"
        if self._is_live:
            self._bars.update(self._task, advance=1, figures=figures)
        elif self._step % max(1, self._num_steps // NUM_LINES) == 0 or self._step == self._num_steps:
            self.print(f"{self._name}: step {self._step} of {self._num_steps}, {figures.replace('  ', ', ')}")
