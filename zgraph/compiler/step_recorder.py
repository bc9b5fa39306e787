"""Keeps what steps take while a model trains: a time for each step, and now and then one for each node."""

from __future__ import annotations

import math
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from zgraph.ir import Instruction, Plan
from zgraph.runfile.records import RUN, RankRecord, rank_files, save_rank
from zgraph.runtime import Session
from zgraph.runtime.executor import Runner
from zgraph.runtime.recorder import Recorder
from zgraph.runtime.transfers import Transfer

NUM_WARMUPS = 2
"""Steps that are not kept: in the first, memory is taken that the others find."""

FIRST, EVERY = 4, 4
"""The step that is taken apart first, and how many times as many steps are before each next one."""

EXPOSED_US = 20.0
"""A wait that is longer has waited for its transfer, whose end is known thereby."""


class StepRecorder:
    """Record of one training graph's steps on this rank, in a folder.

    A step is from the first node of the forward to the last of the backward. In the steps 4, 16, 64, ... each node is
    timed, ops one by one; their own times are not kept.

    Args:
        folder: where to write, without a record in it.
        session: what the programs work on.
    """

    def __init__(self, folder: Path, session: Session) -> None:
        self.folder, self.session = folder, session
        self.rank = session.store.rank
        self.is_taken = False
        self._steps = rank_files(folder, self.rank)[1].open("w", encoding="ascii", buffering=1)
        self._is_over = False
        self._watch = _Stopwatch(session.device)
        self._recorder = Recorder(session.device)
        self._nodes: dict[str, list[float]] = defaultdict(list)
        self._transfers: dict[str, list[float]] = defaultdict(list)
        self._num_steps = self._num_apart = 0
        self._next = FIRST
        self._on_lane: list[Transfer] = []

    @property
    def run_path(self) -> Path:
        """Where the first rank writes the run."""
        return self.folder / RUN

    def watched(self, plan: Plan, forward: Runner, backward: Runner) -> tuple[Runner, Runner]:
        """The runners of a training graph, of which the steps are recorded from now on."""
        self.is_taken = True
        known = {name for node in plan.graph.nodes for name in (node.name, *(r.name for r in node.results))}

        def first(args: list[Any]) -> list[Any]:
            self._begin()
            return forward(args)

        def last(args: list[Any]) -> list[Any]:
            made = backward(args)
            self._end(known)
            return made

        return first, last

    def restart(self) -> None:
        """Record the next training graph, and nothing of this one, which is planned again."""
        self.is_taken = False
        self._nodes.clear()
        self._transfers.clear()
        self._num_steps = self._num_apart = 0
        self._next = FIRST
        self._steps.seek(0)
        self._steps.truncate()
        rank_files(self.folder, self.rank)[0].unlink(missing_ok=True)

    def _begin(self) -> None:
        self._leave()  # what a forward without a backward has begun
        self._num_steps += 1
        if self._num_steps >= self._next and self.session.recorder is None and not self._is_over:
            self.session.recorder = self._recorder
            if self.session.lane is not None:
                self._on_lane = self.session.lane.watch()
        self._watch.begin()

    def _end(self, known: set[str]) -> None:
        reduces = self.session.reduces  # a micro-step that leaves that to a later one is no step of the plan
        self._watch.end(is_kept=reduces and self.session.recorder is None and self._num_steps > NUM_WARMUPS)
        if self._is_over:
            return
        try:
            for us in self._watch.taken():
                self._steps.write(f"{us:.1f}\n")
            if self.session.recorder is self._recorder and reduces:
                self._apart(known)
        except OSError as error:
            self._is_over = True
            warnings.warn(f"steps are not recorded any more: {self.folder}: {error.strerror}", stacklevel=2)
        if self.session.recorder is self._recorder:
            self._leave()

    def _leave(self) -> None:
        if self.session.recorder is self._recorder:
            self.session.recorder = None
            if self.session.lane is not None:
                self.session.lane.unwatch()
        self._recorder.clear()

    def _apart(self, known: set[str]) -> None:
        """Keep a step that was taken apart."""
        runs = self._recorder.runs_us()
        took = {name: us for spans in runs for name, us in transfers_us(spans)}
        began = [i.node.name for spans in runs for i, *_ in spans if i.lane == "comm"]
        if len(began) == len(self._on_lane):  # the lane knows when each of its transfers was over
            took |= zip(began, lane_us(self._on_lane), strict=True)
        for spans in runs:
            for instruction, begin, end in spans:
                if instruction.node.name in known:
                    self._nodes[instruction.node.name].append(end - begin)
        for name, us in took.items():
            if name in known:
                self._transfers[name].append(us)
        self._num_apart += 1
        self._next = EVERY * self._num_steps
        nodes, transfers = ({n: fmean(us) for n, us in of.items()} for of in (self._nodes, self._transfers))
        save_rank(RankRecord(rank=self.rank, num_steps=self._num_apart, nodes=nodes, transfers=transfers), self.folder)


def lane_us(transfers: Sequence[Transfer]) -> Iterator[float]:
    """Microseconds of each transfer of a lane: since it was handed over, or the one before it was over."""
    free = 0
    for transfer in transfers:
        yield (transfer.over_ns - max(transfer.handed_ns, free)) / 1e3
        free = transfer.over_ns


def transfers_us(spans: list[tuple[Instruction, float, float]]) -> Iterator[tuple[str, float]]:
    """The starts of a program's transfers that can be timed, with what each took.

    A lane runs what it is given in order. So a transfer begins with its start, or when the one before it ends, and it
    ends within its wait if that has waited. Where the one before it was over before its wait, its end is not known, but
    for being earlier: then the next is timed only if it was started after that wait began.

    Args:
        spans: the program's instructions, with their begin and end in microseconds.
    """
    started: dict[str, tuple[str, float]] = {}
    waits: dict[str, tuple[float, float]] = {}
    lanes: dict[str, list[str]] = defaultdict(list)
    for instruction, begin, end in spans:
        node = instruction.node
        if instruction.lane != "compute":
            started[node.results[0].name] = node.name, end
            lanes[instruction.lane].append(node.results[0].name)
        elif node.op == "wait":
            waits[node.operands[0].name] = begin, end
    for futures in lanes.values():
        latest, over_by = math.inf, {}
        for future in reversed(futures):  # over before any that was begun later
            latest = over_by[future] = min(latest, waits.get(future, (math.inf, math.inf))[1])
        free, is_exact = 0.0, True
        for future in futures:
            name, handed = started[future]
            begin, end = waits.get(future, (math.inf, math.inf))
            is_exposed = end - begin > EXPOSED_US and over_by[future] == end
            if is_exposed and (is_exact or handed >= free):
                yield name, end - (max(handed, free) if is_exact else handed)
            free, is_exact = (end, True) if is_exposed else (min(begin, over_by[future]), False)


class _Stopwatch:
    """Times from a begin to an end: on a GPU by events of its stream, which are asked when they are over."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu, self._device = device.type != "cpu", device
        self._begun: Any = None
        self._pending: list[tuple[Any, Any]] = []

    def begin(self) -> None:
        self._begun = self._now()

    def end(self, *, is_kept: bool) -> None:
        if is_kept and self._begun is not None:
            self._pending.append((self._begun, self._now()))
        self._begun = None

    def taken(self) -> list[float]:
        """Microseconds of what is over, each once."""
        over = list(takewhile(lambda pair: not self._on_gpu or pair[1].query(), self._pending))
        self._pending = self._pending[len(over) :]
        return [1e3 * a.elapsed_time(b) if self._on_gpu else (b - a) / 1e3 for a, b in over]

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter_ns()
        event = torch.Event(device=self._device, enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


__all__ = ["StepRecorder", "transfers_us"]
