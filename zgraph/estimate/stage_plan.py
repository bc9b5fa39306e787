"""Plan of one ZeRO stage: memory and time of a model on given hardware, and how it is made to fit a memory budget.

Bytes are followed in two parts of the step: until the backward reaches the first layer, where activations have their
peak, and from there on, where gradients have theirs. What does not fit is computed again in the backward or moved to
the host, whichever is faster. If neither is enough, optimizer states are on the host too, and if that is not enough,
parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import inf

from zgraph.codegen import library as _kernels  # noqa: F401 - registers the workspace of ops
from zgraph.cost import CostTable
from zgraph.estimate.layer_scaling import LayerSamples
from zgraph.estimate.shape import Shape
from zgraph.estimate.stage_figures import TIED, StagePlan
from zgraph.estimate.unplaced import Unplaced
from zgraph.ir import Axis, DType, Mesh, Shard, model_axes
from zgraph.options.compression import Codes
from zgraph.options.validate import Compute, Kernels
from zgraph.passes import RECIPES, Context, along_model_axes, compressing, recipe_for
from zgraph.passes.core.base import Choice


@dataclass(frozen=True)
class Planner:
    """Plans stages of one model on one kind of hardware.

    Args:
        samples: the model.
        num_ranks: ranks that it is sharded over.
        costs: of the hardware.
        budget: bytes that one rank's device may have alive.
        host_budget: bytes that one rank may have on the host; None sets no limit.
        places: what may be at rest on the host, what is tried first before the rest: "", "optimizer", "parameters".
        moves: whether activations may wait on the host.
        kernels: what runs the ops between collectives, as for `zgraph.compile`.
        compute: what matrices are multiplied in, as there.
        recomputes: whether the forward is computed again where it has no room, never, or always.
        reduce_dtype: dtype in which gradients are summed over ranks.
        accumulation: micro-steps of a step.
        num_copies: ranks that hold the same shard.
        hints: how many threads processors have, where it is them that compute.
        tensor: ranks that compute each op together.
        searches: what is searched of the placements along them: "all", "values", or nothing.
        placed: how parameters are cut over them where that is not searched, by name.
        codes: what is sent in the place of numbers.
        context: ranks that share each sequence.
        expert: ranks that share the experts.
        expandable: whether the allocator of GPUs has expandable segments.
        room_bytes: bytes of a GPU that may be reserved, beside what is not torch's; None sets no limit.
        library_bytes: of the matmul library's workspace.
        experts: names of the parameters that are their matrices.
    """

    samples: LayerSamples
    num_ranks: int
    costs: CostTable
    budget: int
    host_budget: int | None
    places: tuple[str, ...]
    moves: bool
    kernels: Kernels = "aten"
    compute: Compute | None = None
    recomputes: Choice = "auto"
    reduce_dtype: DType | None = None
    accumulation: int = 1
    num_copies: int = 1
    hints: Mapping[str, int] = field(default_factory=dict)
    tensor: int = 1
    codes: Codes = field(default_factory=Codes)
    context: int = 1
    expert: int = 1
    expandable: bool = False
    room_bytes: int | None = None
    library_bytes: int = 0
    experts: frozenset[str] = frozenset()
    searches: str = "all"
    placed: Mapping[str, Shard] = field(default_factory=dict)

    @cached_property
    def unplaced(self) -> Unplaced:
        """The samples before they are placed."""
        return Unplaced(self.samples, self.pass_context)

    @cached_property
    def pass_context(self) -> Context:
        """Context of all passes."""
        return Context(
            mesh=self.mesh, costs=self.costs, groups_calls=True, reduce_dtype=self.reduce_dtype, hints=self.hints
        )

    @property
    def together(self) -> int:
        """Ranks that compute together."""
        return self.tensor * self.context * self.expert

    @property
    def mesh(self) -> Mesh:
        """The mesh: of ranks that compute together, of copies of shards, and of shards; of one rank, none."""
        sizes = {"tensor": self.tensor, "context": self.context, "expert": self.expert}
        together = tuple(Axis(name, size) for name, size in sizes.items() if size > 1)
        copies = (Axis("replica", self.num_copies),) if self.num_copies > 1 else ()
        shards = Axis("shard", self.num_ranks // self.num_copies // self.together)
        return (*together, *copies, shards) if self.num_ranks > 1 else ()

    def recipe(self, stage: int) -> str:
        """The passes of a stage."""
        found = recipe_for(self.kernels, RECIPES[stage], self.compute)
        found = compressing(found, self.codes.gradients, self.codes.parameters) if self.codes else found
        axes = [axis.name for axis in model_axes(self.mesh)]
        return along_model_axes(found, axes, searches=self.searches if self.tensor > 1 else "") if axes else found

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
