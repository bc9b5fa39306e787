"""One more plan for a program whose first run is out of memory, with a budget of what there is.

The ranks plan again together, if all of them ran out of memory at the same place: only then nobody waits for a
collective that another rank never begins. Else the error reaches the user, with advice.
"""

from __future__ import annotations

import functools
import gc
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from traceback import walk_tb
from typing import Any

import torch

from zgraph.bridge.target import allocator_advice
from zgraph.compiler.compiled_model import CompiledModel, Trial
from zgraph.errors import BudgetError
from zgraph.runtime import Session
from zgraph.runtime.executor import LABEL
from zgraph.viz import gibibytes

AGREE_S = 20.0
"""Seconds that a rank without memory waits for the others to have none either."""

LEAST_SHARE = 1 / 64
"""The least share of a step's peak that the next plan leaves free."""

_UNITS = {"bytes": 0, "B": 0, "KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}
_SIZE = r"([0-9.]+) (bytes|[KMGT]?i?B)"
_TRIED, _FREE = re.compile(f"Tried to allocate {_SIZE}"), re.compile(f"of which {_SIZE} is free")


def missing_bytes(error: BaseException) -> int:
    """Bytes that an allocation lacked, by what torch's error says; 0 where it says nothing.

    >>> missing_bytes(RuntimeError("Tried to allocate 2.00 GiB. GPU 0 has ... of which 512.00 MiB is free."))
    1610612736
    """
    tried, free = (_bytes(pattern.search(str(error))) for pattern in (_TRIED, _FREE))
    return tried - free if free < tried else tried


def _bytes(found: re.Match[str] | None) -> int:
    return int(float(found[1]) * 2 ** _UNITS.get(found[2], 0)) if found else 0


def capacity_bytes(device: torch.device) -> int | None:
    """Bytes that torch's allocator can have alive on a GPU, as it is now; None on a processor.

    Memory that it has reserved and cannot use for what it was asked for is not among them.
    """
    if device.type == "cpu":
        return None
    return int(torch.cuda.memory_allocated(device) + torch.cuda.mem_get_info(device)[0])


def place_of(error: BaseException) -> str:
    """The instruction of a program that raised an error, the same on all ranks; empty if none did."""
    places = [(frame.f_code.co_filename, line) for frame, line in walk_tb(error.__traceback__)]
    return next((f"{file}:{line}" for file, line in reversed(places) if file.startswith(LABEL)), "")


def agreed(session: Session, place: str, budget: int) -> int:
    """The smallest budget that any rank asks for, if all of them are out of memory at this place. All learn the same.

    0 where one is not, or is elsewhere, as it may be waiting for a collective that this rank never begins; or where
    one has no use for a smaller budget, and asks for 0.
    """
    if session.is_alone:
        return budget
    try:
        return session.peers.smallest("short", place, budget, AGREE_S)
    except RuntimeError:  # the store is gone, and with it whoever kept it
        return 0


@dataclass
class FirstRun(Trial):
    """The first runs of one program's forward and backward, which may be out of memory.

    Args:
        compiled: the model.
        peak_bytes: that the plan predicts, all that is at rest included.
        may_repeat: whether a forward that failed can be run again by itself.
    """

    compiled: CompiledModel
    peak_bytes: int
    may_repeat: bool
    _passed: set[str] = field(default_factory=set)
    _drawn: list[torch.Tensor] = field(default_factory=list)
    _runs: str = ""

    def watched(self, run: Callable[[list[Any]], list[Any]], phase: str) -> Callable[[list[Any]], list[Any]]:
        """A forward or a backward, of which it is known whether it has run once."""

        def watched(args: list[Any]) -> list[Any]:
            if phase in self._passed:
                return run(args)
            self._runs = phase
            self._drawn = _random_states(self.compiled.session.device) if phase == "forward" else []
            made = run(args)
            self._passed.add(phase)
            self._drawn.clear()
            return made

        return watched

    def survives(self, error: BaseException) -> bool:
        """Whether the ranks agree to plan again after an error. If not, an error of memory is given advice."""
        if not isinstance(error, torch.OutOfMemoryError):
            return False
        compiled = self.compiled
        context, device = compiled.context, compiled.session.device
        wanted = min(self.peak_bytes, context.memory_budget or self.peak_bytes)
        wanted -= max(missing_bytes(error), int(LEAST_SHARE * self.peak_bytes))
        if (capacity := capacity_bytes(device)) is not None:
            wanted = min(wanted, capacity)
        is_first = self._runs not in self._passed and not compiled.is_replanned and compiled.replayed is None
        is_first = is_first and compiled.smaller_budget is None  # the keys of the agreement are those of the call
        if self._runs == "forward" and not self.may_repeat:
            is_first = is_first and compiled.session.is_alone  # the others are told that this one fails
        wanted = wanted if wanted > context.rest_bytes else 0
        smaller = agreed(compiled.session, place_of(error), wanted) if is_first else 0
        allocator = allocator_advice(device)
        if not smaller:
            fewer = f"pass memory_budget={wanted} ({gibibytes(wanted)}) or less"
            remedy = fewer if wanted else "shard over more ranks, or offload"
            error.add_note(
                f"zgraph: the step was planned for a peak of {gibibytes(self.peak_bytes)}; {remedy}"
                f"{f'; {allocator}' if allocator else ''}"
            )
            return False
        compiled.smaller_budget = smaller
        if self._runs == "forward" and self.may_repeat:
            _restore(self._drawn, device)
        else:
            error.add_note(
                f"zgraph: the next call of the model is planned with a budget of {gibibytes(smaller)}: set gradients "
                f"to None and run the step again{f'; {allocator}' if allocator else ''}"
            )
        return True


def replanning(
    forward: Callable[..., Any], compiled: CompiledModel, forget: Callable[[], None], *, may_repeat: bool
) -> Callable[..., Any]:
    """`forward`, captured and planned anew once a first run was out of memory; and run again, if it may be."""

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        if compiled.smaller_budget is not None:
            _plan_again(compiled, forget)
        try:
            return forward(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            if compiled.smaller_budget is None or not may_repeat:
                raise
            failed = error.with_traceback(None)  # whose frames hold the values of the program
        _plan_again(compiled, forget)
        compiled.session.begin_call()
        try:
            return forward(*args, **kwargs)
        except BudgetError as error:
            failed.add_note(f"zgraph planned again with a smaller budget, and {error}")
            raise failed from None

    return call


def _plan_again(compiled: CompiledModel, forget: Callable[[], None]) -> None:
    """Let go of what was compiled, and of what the step that failed has left."""
    compiled.plan_smaller()
    forget()
    gc.collect()
    if compiled.session.device.type != "cpu":
        torch.cuda.synchronize(compiled.session.device)  # collectives that were begun write to memory that is freed
        torch.cuda.empty_cache()


def _random_states(device: torch.device) -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    return states if device.type == "cpu" else [*states, torch.cuda.get_rng_state(device)]


def _restore(states: list[torch.Tensor], device: torch.device) -> None:
    if states:
        torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)
