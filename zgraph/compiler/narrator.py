"""Messages to the user while a model is captured and compiled: a line for each graph, and a bar where it takes long.

Lines go to the logger `zgraph`. Where the user has set up no logging they go to standard error as well, so that a first
step is never silent. ZGRAPH_LOGS chooses the kinds.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch.utils import _pytree as pytree

from zgraph.bridge.private_compile import on_break, on_capture
from zgraph.cost import Interval, bytes_text, time_text
from zgraph.ir import Graph
from zgraph.passes import Pass
from zgraph.passes.core.instruments import PassSummary
from zgraph.viz import gibibytes

log = logging.getLogger("zgraph")

SILENT_SECONDS = 2.0
"""Seconds after which a bar is shown."""

_calling: ContextVar[Narrator | None] = ContextVar("zgraph_calling", default=None)


@dataclass(frozen=True)
class Tensor:
    """Properties of a tensor argument that torch looks at."""

    shape: tuple[int, ...]
    dtype: torch.dtype


Arguments = Mapping[str, Any]
"""Arguments of a call, by name: a `Tensor` for each tensor, and other values as they are."""


def tell(text: str) -> None:
    """Log a line; where the user has set up no logging, write it to standard error."""
    if log.hasHandlers() or log.level != logging.NOTSET:
        log.info(text)
    else:
        sys.stderr.write(f"zgraph: {text}\n")


class Narrator:
    """Tells of one model's captures.

    Args:
        model: its name.
        like: its forward, whose arguments have names.
        kinds: what is told, of `zgraph.environment.LOG_KINDS`; nothing on ranks but the first.
        where: its stage and its ranks, in words.
        in_pieces: whether it is captured in pieces, each a graph of its own.
    """

    def __init__(
        self, model: str, like: Callable[..., Any], kinds: Collection[str], where: str, *, in_pieces: bool = False
    ) -> None:
        self.model, self.kinds, self.where, self.in_pieces = model, frozenset(kinds), where, in_pieces
        self._breaks: set[str] = set()
        self.seconds = 0.0
        self._signature = inspect.signature(like)
        self._model = getattr(like, "__self__", None)
        self._given: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._grads = True
        self._seen: list[Arguments] = []
        self._is_told = False
        self._began = 0.0
        self._bar = Bar(model)

    def watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """A call of the model of which it is known when torch captures it."""
        if not self.kinds:
            return call
        if self.in_pieces:
            on_break(_broke)

        @functools.wraps(call)
        def watched(*args: Any, **kwargs: Any) -> Any:
            on_capture(_begun)
            self._given, self._grads, self._is_told = (args, kwargs), torch.is_grad_enabled(), False
            token = _calling.set(self)
            try:
                return call(*args, **kwargs)
            finally:
                _calling.reset(token)
                self._given = None
                self._bar.stop()

        return watched

    def begun(self) -> None:
        """A capture begins."""
        self._began = time.perf_counter()
        if "progress" in self.kinds and "passes" not in self.kinds:
            self._bar.start()

    def captured(self, graph: Graph, num_passes: int, *, is_general: bool) -> None:
        """The graph is there, and the passes are next. `is_general` says that some size is a symbol in it."""
        self.seconds = time.perf_counter() - self._began if self._began else 0.0
        self._bar.passes(num_passes)
        if self._given is None or self._is_told:
            return  # a further piece of a call that is captured in pieces
        self._is_told = True
        modes = {"model.training": getattr(self._model, "training", None), "torch.is_grad_enabled()": self._grads}
        now = {**described(self._signature, *self._given), **modes}
        if self._seen and "recompiles" in self.kinds:
            before = min(self._seen, key=lambda seen: len([*changes(seen, now)]))
            said = ", ".join(changes(before, now)) or (
                "no size, dtype or mode of its arguments changed; TORCH_LOGS=recompiles says which guard failed"
            )
            general = "; sizes that change are symbols from now on" if is_general else ""
            tell(f"{graph.name} is captured again, time {len(self._seen) + 1}: {said}{general}")
        self._seen.append(now)

    def broke(self, place: str, reason: str) -> None:
        """A piece ends, and eager code begins."""
        if place not in self._breaks and "capture" in self.kinds:
            self._breaks.add(place)
            self._bar.stop()
            tell(f"{self.model}: a piece ends at {place}: {reason.rstrip('.')}; eager code reads gathered parameters")

    def left_eager(self, why: str) -> None:
        """A piece runs eagerly, because zgraph cannot take it."""
        if why not in self._breaks and "capture" in self.kinds:
            self._breaks.add(why)
            self._bar.stop()
            tell(f"{self.model}: a piece runs eagerly and gathers each parameter where it is read: {why}")

    def remark(self, why: str) -> None:
        """Something is not as it could be: a candidate for running a group failed, say."""
        if "capture" in self.kinds:
            self._bar.stop()
            tell(f"{self.model}: {why}")

    def replanned(self, budget: int) -> None:
        """The first run was out of memory: what is captured next is no other call."""
        self._seen.clear()
        self.remark(f"the first run was out of memory; it is planned again with a budget of {gibibytes(budget)}")

    def after(self, step: Pass, before: Graph, after: Graph, seconds: float) -> None:
        """A pass has run: this is an instrument of the pipeline."""
        self._bar.advance(step.name)
        if "passes" in self.kinds:
            found = PassSummary.of(step.name, before, after, seconds)
            tell(f"{found.text}: {found.summary}; {found.num_nodes:,} nodes, {1e3 * seconds:,.0f} ms")

    def compiled(
        self, graph: Graph, steps: Collection[PassSummary], step: Interval, peak: Interval, source: str = ""
    ) -> None:
        """The graph is compiled: what was captured, the passes, and what a step is predicted to take.

        Args:
            graph: as captured.
            steps: the passes.
            step, peak: of time and of memory.
            source: where the plan comes from; empty where the passes ran here.
        """
        self._began = 0.0
        self._bar.stop()
        if "capture" in self.kinds:
            seconds = sum(step.seconds for step in steps)
            took = f"{len(steps)} passes in {seconds:.1f} s"
            if source:
                took = f"the plan is reused from {source}, which saves {took}"
            tell(
                f"captured {self.model}, {len(graph.nodes):,} nodes in {self.seconds:.1f} s; {took}; "
                f"{self.where}; predicted step {time_text(step)}, "
                f"peak {bytes_text(peak)}"
            )


def _begun() -> None:
    """Tell whoever is called that torch captures."""
    if (narrator := _calling.get()) is not None:
        narrator.begun()


def _broke(place: str, reason: str) -> None:
    """Tell whoever is called of a graph break."""
    if (narrator := _calling.get()) is not None:
        narrator.broke(place, reason)


def described(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
    """Arguments of a call, by name."""
    try:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given: Mapping[str, Any] = bound.arguments
    except TypeError:
        given = {**{f"argument {n}": arg for n, arg in enumerate(args)}, **kwargs}
    found: dict[str, Any] = {}
    for name, value in given.items():
        for path, leaf in pytree.tree_flatten_with_path(value)[0]:
            place = name + pytree.keystr(path)
            if isinstance(leaf, torch.Tensor):
                found[place] = Tensor(tuple(leaf.shape), leaf.dtype)
            elif isinstance(leaf, bool | int | float | str | None):
                found[place] = leaf
    return found


def changes(before: Arguments, now: Arguments) -> Iterator[str]:
    """Changes in the arguments from one call to another, sizes first."""
    both = [(place, old, now[place]) for place, old in before.items() if place in now and now[place] != old]
    for place, old, new in both:
        if isinstance(old, Tensor) and isinstance(new, Tensor):
            yield from _changed(place, old, new)
    for place, old, new in both:
        if not (isinstance(old, Tensor) and isinstance(new, Tensor)):
            yield f"{place} changed from {_shown(old)} to {_shown(new)}"
    yield from (f"{place} is given now" for place in now if place not in before)
    yield from (f"{place} is not given any more" for place in before if place not in now)


def _changed(place: str, old: Tensor, new: Tensor) -> Iterator[str]:
    if len(old.shape) != len(new.shape):
        yield f"{place}.shape changed from {old.shape} to {new.shape}"
    else:
        for dim, (before, now) in enumerate(zip(old.shape, new.shape, strict=True)):
            if before != now:
                yield f"{place}.shape[{dim}] changed from {before} to {now}"
    if old.dtype != new.dtype:
        yield f"{place}.dtype changed from {old.dtype} to {new.dtype}"


def _shown(value: Any) -> str:
    return "a tensor" if isinstance(value, Tensor) else repr(value)[:60]


class Bar:
    """A progress bar on a terminal, shown once something has taken `SILENT_SECONDS`."""

    def __init__(self, model: str) -> None:
        self.model = model
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._shown: Progress | None = None
        self._task: Any = None
        self._text, self._total, self._done = "", 0, 0

    def start(self) -> None:
        """Begin to count the seconds; nothing where no one watches."""
        if not sys.stderr.isatty():
            return
        self.stop()
        self._text, self._total, self._done = f"capturing {self.model}", 0, 0
        self._timer = threading.Timer(SILENT_SECONDS, self._show)
        self._timer.daemon = True
        self._timer.start()

    def passes(self, count: int) -> None:
        """The passes begin."""
        self._text, self._total, self._done = f"{count} passes on {self.model}", count, 0
        self._update()

    def advance(self, name: str) -> None:
        """A pass is over."""
        self._text, self._done = f"passes on {self.model}: {name} is done", self._done + 1
        self._update()

    def stop(self) -> None:
        """Take the bar away."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            if self._shown is not None:
                self._shown.stop()
            self._timer = self._shown = None

    def _show(self) -> None:
        with self._lock:
            if self._timer is None:
                return
            columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()
            self._shown = Progress(
                *columns,
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._task = self._shown.add_task(self._text, total=self._total or None, completed=self._done)
            self._shown.start()

    def _update(self) -> None:
        with self._lock:
            if self._shown is not None:
                self._shown.update(self._task, description=self._text, total=self._total, completed=self._done)
