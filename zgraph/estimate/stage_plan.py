"""Plan of one ZeRO stage: memory and time of a model on given hardware, and how it is made to fit a memory budget.

Bytes are followed in two parts of the step: until the backward reaches the first layer, where activations have their
peak, and from there on, where gradients have theirs. What does not fit is computed again in the backward or moved to
the host, whichever is faster. If neither is enough, optimizer states are on the host too, and if that is not enough,
parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from zgraph.codegen import library as _kernels  # noqa: F401 - registers the workspace of ops
from zgraph.estimate.planned_job import PlannedJob
from zgraph.estimate.shape import Shape
from zgraph.estimate.stage_figures import TIED, StagePlan
from zgraph.ir import model_axes


@dataclass(frozen=True)
class Planner(PlannedJob):
    """Plans stages of one model on one kind of hardware."""

    def plan(self, stage: int) -> StagePlan:
        """The fastest plan that fits, with as little on the host as that takes; else the one that needs the least."""
        (found,) = self.plans((stage,))
        return found

    def plans(self, stages: Sequence[int], *, best_only: bool = False) -> tuple[StagePlan, ...]:
        """The plan of each stage; or those of them that are the best of the stages or close, where one fits and the
        others are not asked for."""
        if best_only and (found := self._best(stages)):
            return found
        tried = [self._tried(stage) for stage in stages]
        return tuple(found or shape.reserving(shape.finished(shape.smallest), shape.smallest) for found, shape in tried)

    def _best(self, stages: Sequence[int]) -> tuple[StagePlan, ...]:
        """Plans that fit of those stages that may be the best: a stage that is slower than others is left out, which
        bounds say of most before they are simulated."""
        found: dict[int, StagePlan] = {}
        for stage in sorted(stages, reverse=True):  # the last needs the fewest bytes, and computes the least again
            fastest = min((plan.total_us for plan in found.values()), default=inf)
            if (plan := self._within(stage, fastest * TIED)) is not None:
                found[stage] = plan
        return tuple(found[stage] for stage in stages if stage in found)

    def _within(self, stage: int, limit_us: float) -> StagePlan | None:
        """The plan of a stage; None where it does not fit, or takes longer than the limit."""
        slower: list[Shape] = []
        for place in self.places:
            shape = Shape(self, stage, frozenset(), place)
            if not shape.may_fit:
                continue
            found = self._fastest(shape, limit_us) if shape.least_us(None) <= limit_us else None
            if found is None:
                slower.append(shape)
            elif all(self._fastest(other) is None for other in slower):
                return found if found.total_us <= limit_us else None
            else:
                return None
        return None

    def _tried(self, stage: int) -> tuple[StagePlan | None, Shape]:
        """The fastest plan that fits, if there is one, and the last shape that was tried."""
        for place in self.places:
            shape = Shape(self, stage, frozenset(), place)
            if (found := self._fastest(shape)) is not None:
                return found, shape
        return None, shape

    def peak_bytes(self, stage: int) -> int:
        """The peak of a step that keeps all but what the user marked, whatever the budget."""
        return Shape(self, stage, frozenset(), "").option(None, 0.0).total_bytes

    def reserved_bytes(self, stage: int) -> int:
        """Bytes that a GPU's allocator reserves for that step."""
        shape = Shape(self, stage, frozenset(), "")
        return shape.footprint(shape.option(None, 0.0), expandable=self.expandable).reserved_bytes

    def _fastest(self, shape: Shape, limit_us: float = inf) -> StagePlan | None:
        """The fastest way to make it fit; None if there is none, or none within a limit."""
        if not shape.may_fit:
            return None
        best: tuple[float, int, StagePlan] | None = None
        for number, option in sorted(enumerate(shape.fitting), key=lambda way: shape.least_us(way[1].price)):
            if shape.least_us(option.price) > (limit_us if best is None else best[0]):
                break
            found = shape.finished(option)
            key = found.total_us, number
            if (best is None or key < best[:2]) and (found := shape.reserving(found, option)).fits:
                best = *key, found
        return None if best is None else best[2]

    def refined(self, plan: StagePlan, parameters: Sequence[tuple[str, int]]) -> StagePlan:
        """The plan with parameters up to some size kept whole on all ranks, where that is faster and fits.

        Whole parameters need no gather, which the forward waits for; the reduction of their gradients can hide behind
        the backward. It pays where the network is the bound, at the cost of their bytes.

        Args:
            plan: what to start from.
            parameters: names and bytes, of the whole model.
        """
        best = plan
        if not plan.stage or not plan.fits or self.num_ranks == 1 or model_axes(self.mesh):
            return plan
        for size in sorted({num_bytes for _, num_bytes in parameters}):
            whole = frozenset(name for name, num_bytes in parameters if num_bytes <= size)
            shape = Shape(self, plan.stage, whole, plan.offload)
            if not shape.may_fit or not (option := shape.fitted(plan.moved_share)).fits:
                break
            if shape.least_us(option.price) < best.total_us > (found := shape.finished(option)).total_us:
                best = min(best, shape.reserving(found, option), key=lambda p: (not p.fits, p.total_us))
        return best
