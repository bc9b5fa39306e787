"""Make the step fit the memory budget at the least time: each value is kept, computed again, or moved to the host.

    fwd %a = aten.mm.default(%x, %w)               fwd %a = aten.mm.default(%x, %w)
    fwd %b = aten.silu.default(%a)           ->    fwd %b = aten.silu.default(%a)
    ...                                            fwd %a_host = reshard(%a)               moved: the copies are hidden
    bwd %d = ...(%a, %b)                           bwd %a_back = reshard(%a_host)
                                                   bwd %b_again = aten.silu.default(%a_back)      computed again: cheap
                                                   bwd %d = ...(%a_back, %b_again)

A byte costs the same to move whatever it is part of, and nothing where the schedule hides it. So it is amounts that are
tried: none, what the link carries while the forward computes, and as much as it takes; what the forward makes first
leaves first, as there is the most to hide it behind. For each, as many bytes are kept as the budget has room for, at
the least time (`analysis/forward.py`); then the schedule says which is fastest. Whether a graph fits is not believed
but simulated. Regions that the user put under `torch.utils.checkpoint` are always computed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from zgraph.cost import MemoryCurve
from zgraph.ir import Graph, Phase
from zgraph.passes.analysis.blocks import Choice
from zgraph.passes.analysis.forward import Forward
from zgraph.passes.analysis.lookahead import makespan_us, peak_bytes, step_memory
from zgraph.passes.core.base import Context, Pass
from zgraph.passes.offload import Saved

MAX_TRIALS = 12
"""How often the step's memory is simulated to find how many bytes may be kept."""

NO_LIMIT = 1 << 62

SEARCH_MARGIN = 64
"""The search keeps this part of its interval away from both of its ends."""

PRECISION = 100
"""The search ends when no more than this part of the limit is unused."""


@dataclass(frozen=True)
class Fit(Pass):
    """Make the step fit the memory budget at the least time: each value is kept, computed again, or moved to the host.

    Without a budget all is kept, but for what the user marked or always wants to have moved or computed again.
    """

    name: ClassVar[str] = "fit"
    requires: ClassVar[frozenset[str]] = frozenset({"placed"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"lowered"})

    def run(self, graph: Graph, context: Context) -> Graph:
        context = context.fitting
        limit = NO_LIMIT if context.step_bytes is None else context.step_bytes
        is_wanted = any(n.checkpoint for n in graph.nodes) or "always" in (context.recomputes, context.offloads)
        if not graph.phase_nodes(Phase.backward) or (limit == NO_LIMIT and not is_wanted):
            return graph
        if not is_wanted and peak_bytes(graph, context) <= limit:
            return graph
        fitter = _Fitter(Forward(graph, context), limit)
        found: list[_Trial] = []
        fitting: list[_Trial] = []
        for move_bytes in fitter.shares():
            if any(not t.is_again or t.us <= fitter.least_us(move_bytes) for t in fitting):
                break  # to move more would only be slower
            found.append(fitter.best(move_bytes))
            if found[-1].peak_bytes <= limit:
                fitting.append(found[-1])
        if not fitting:
            return min(found, key=lambda t: t.peak_bytes).graph
        return min(fitting, key=lambda t: t.us).graph if len(fitting) > 1 else fitting[0].graph


@dataclass(frozen=True)
class _Trial:
    """How much may be kept (None: all) and how much of it moved; what is kept then; the graph, its memory, and whether
    anything is computed again."""

    keep_bytes: int | None
    kept_bytes: int
    move_bytes: int
    graph: Graph
    memory: MemoryCurve
    is_again: bool
    context: Context

    @cached_property
    def peak_bytes(self) -> int:
        return self.memory.peak.total_bytes

    @cached_property
    def us(self) -> float:
        return makespan_us(self.graph, self.context, self.memory)


class _Fitter:
    """Finds, for an amount that may be moved to the host, the graph that computes the least again."""

    def __init__(self, forward: Forward, limit: int) -> None:
        self.forward, self.limit = forward, limit
        self.target = limit - limit // (2 * PRECISION)
        self.kept: dict[tuple[int | None, bool], tuple[list[Choice], Saved]] = {}
        self.tried: dict[tuple[int | None, int, bool], _Trial] = {}

    def shares(self) -> list[int]:
        """Amounts to try: none, what the link hides behind the forward, all."""
        forward, context = self.forward, self.forward.context
        if context.offloads == "never":
            return [0]
        everything = sum(Saved(forward.graph, context).num_bytes.values())
        if context.offloads == "always":
            return [everything]
        return sorted({0, min(forward.hidden_bytes, everything), everything})

    def trial(self, keep_bytes: int | None, move_bytes: int, *, exactly: bool = False) -> _Trial:
        key = keep_bytes, move_bytes, exactly
        if key not in self.tried:
            self.tried[key] = self._trial(*key)
        return self.tried[key]

    def _trial(self, keep_bytes: int | None, move_bytes: int, exactly: bool) -> _Trial:
        choices, saved = self.keeping(keep_bytes, exactly)
        graph = saved.offloading(saved.first(move_bytes)) if move_bytes else saved.graph
        kept_bytes = sum(c.num_bytes for c in choices)
        is_again = any(choice.us > 0 for choice in choices)
        context = self.forward.context
        return _Trial(keep_bytes, kept_bytes, move_bytes, graph, step_memory(graph, context), is_again, context)

    def least_us(self, move_bytes: int) -> float:
        """Lower bound in microseconds of a step that computes nothing again and may move `move_bytes` to the host.

        Bytes that must leave are gone when the forward ends. Copies that the forward does not hide delay the step.
        """
        forward = self.forward
        leaving = min(move_bytes, max(self.trial(None, 0).peak_bytes - self.limit, 0))
        link = forward.context.costs.hardware.host_link
        return forward.us + 1e6 * max(leaving - forward.hidden_bytes, 0) / link.bytes_per_s

    def keeping(self, keep_bytes: int | None, exactly: bool) -> tuple[list[Choice], Saved]:
        """The choice for each block, and the graph that keeps them, with the values that could wait on the host."""
        key = keep_bytes, exactly
        if key not in self.kept:
            choices = self.forward.choices(keep_bytes, exactly=exactly)
            self.kept[key] = choices, Saved(self.forward.keeping(choices), self.forward.context)
        return self.kept[key]

    def best(self, move_bytes: int) -> _Trial:
        """The graph that moves at most so much and computes the least again; the one with the lowest peak if none
        fits."""
        context = self.forward.context
        most = self.trial(0 if context.recomputes == "always" else None, move_bytes)
        if most.peak_bytes > self.limit:
            return self.keeping_most(most) if context.recomputes == "auto" else most
        return self.moving_least(most) if move_bytes and context.offloads == "auto" else most

    def keeping_most(self, most: _Trial) -> _Trial:
        """The graph that keeps the most, where not all of it can be kept."""
        over = lowest = most
        fits: _Trial | None = None
        num_trials = 0
        while fits is None and over.kept_bytes > 0 and num_trials < MAX_TRIALS:
            factor = 1 if num_trials < 2 else 1 << num_trials
            wanted = over.kept_bytes - factor * (over.peak_bytes - self.target)
            found = self.trial(max(wanted, 0), most.move_bytes)
            lowest = min(lowest, found, key=lambda t: t.peak_bytes)
            if found.peak_bytes <= self.limit:
                fits = found
            elif found.kept_bytes == over.kept_bytes:
                break  # no choice keeps less
            else:
                over = found
            num_trials += 1
        if fits is None:
            return lowest
        while num_trials < MAX_TRIALS and not self.is_close(fits) and over.kept_bytes - fits.kept_bytes > 1:
            wanted = self.between(fits, fits.kept_bytes, over, over.kept_bytes, num_trials)
            found = self.trial(wanted, most.move_bytes)
            if found.kept_bytes <= fits.kept_bytes:
                break
            over, fits = (over, found) if found.peak_bytes <= self.limit else (found, fits)
            num_trials += 1
        if self.is_close(fits):
            return fits
        unused = self.limit - fits.peak_bytes
        for more_bytes in (unused, unused // 2, unused // 4, 0):
            exact = self.trial(fits.kept_bytes + more_bytes, most.move_bytes, exactly=True)
            if exact.peak_bytes <= self.limit:
                return exact
        return fits

    def moving_least(self, most: _Trial) -> _Trial:
        """The graph that moves the least, where nothing needs to be computed again."""
        fits, over = most, self.trial(most.keep_bytes, 0)
        if over.peak_bytes <= self.limit:
            return over
        for number in range(MAX_TRIALS):
            if self.is_close(fits) or fits.move_bytes - over.move_bytes <= 1:
                break
            found = self.trial(fits.keep_bytes, self.between(fits, fits.move_bytes, over, over.move_bytes, number))
            fits, over = (found, over) if found.peak_bytes <= self.limit else (fits, found)
        return fits

    def is_close(self, fits: _Trial) -> bool:
        """Whether hardly any byte of the limit is unused."""
        return self.limit - fits.peak_bytes <= self.limit // PRECISION

    def between(self, fits: _Trial, fits_at: int, over: _Trial, over_at: int, number: int) -> int:
        """Where to try next, not too close to either.

        A byte is a byte at the peak, seen from the closer of the two; every third time, as not every byte is alive
        there, where a line through both would reach the target.
        """
        span = abs(over_at - fits_at)
        below, above = self.target - fits.peak_bytes, over.peak_bytes - self.target
        if number % 3 == 2:
            share = below / max(below + above, 1)
        else:
            share = below / span if below < above else 1 - above / span
        share = min(max(share, 1 / SEARCH_MARGIN), 1 - 1 / SEARCH_MARGIN)
        return fits_at + int(share * (over_at - fits_at))
