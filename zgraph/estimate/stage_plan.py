"""Plan of one ZeRO stage: memory and time of a model on given hardware, and how it is made to fit a memory budget.

Bytes are followed in two parts of the step: until the backward reaches the first layer, where activations have their
peak, and from there on, where gradients have theirs. What does not fit is computed again in the backward or moved to
the host, whichever is faster. If neither is enough, optimizer states are on the host too, and if that is not enough,
parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from zgraph.codegen import library as _kernels  # noqa: F401 - registers the workspace of ops
from zgraph.cost import CostTable, memory_interval, time_interval
from zgraph.cost.reserved import Footprint
from zgraph.cost.rest import UPDATE_PASSES, at_rest, copies_bytes, feedback_bytes, update_scratch
from zgraph.estimate.layer_scaling import LayerSamples
from zgraph.estimate.member import Member
from zgraph.estimate.reservation import scaled_footprint
from zgraph.estimate.stage_figures import StagePlan
from zgraph.ir import Axis, DType, Graph, Input, InputKind, Mesh, Placement, Shard, model_axes
from zgraph.options.compression import Codes
from zgraph.options.parallel import cuts_at_rest, rest_axes
from zgraph.options.validate import Compute, Kernels
from zgraph.passes import RECIPES, Context, along_model_axes, compressing, parse_recipe, recipe_for
from zgraph.passes.analysis.lookahead import step_memory
from zgraph.passes.canonicalize import Canonicalize
from zgraph.passes.code_gathers import CodeGathers
from zgraph.passes.compress import Compress
from zgraph.passes.core.base import Choice
from zgraph.passes.dce import DeadCode
from zgraph.passes.fuse import Fuse
from zgraph.passes.fusion.loss import fused_losses, loss_nodes
from zgraph.passes.offload import Saved

RESTING = ("parameters", "optimizer", "buffers")
CATEGORIES = (*RESTING, "gradients", "activations", "gathered", "temporaries", "buckets")


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

    def plans(self, stages: Sequence[int], *, fitting_only: bool = False) -> tuple[StagePlan, ...]:
        """The plan of each stage; or those that fit, where one does and the others are not asked for."""
        tried = [self._tried(stage) for stage in stages]
        if fitting_only and (fitting := [found for found, _ in tried if found is not None]):
            return tuple(fitting)
        return tuple(found or shape.reserving(shape.finished(shape.smallest), shape.smallest) for found, shape in tried)

    def _tried(self, stage: int) -> tuple[StagePlan | None, _Shape]:
        """The fastest plan that fits, if there is one, and the last shape that was tried."""
        for place in self.places:
            shape = _Shape(self, stage, frozenset(), place)
            if (found := self._fastest(shape)) is not None:
                return found, shape
        return None, shape

    def peak_bytes(self, stage: int) -> int:
        """The peak of a step that keeps all but what the user marked, whatever the budget."""
        return _Shape(self, stage, frozenset(), "").option(None, 0.0).total_bytes

    def reserved_bytes(self, stage: int) -> int:
        """Bytes that a GPU's allocator reserves for that step."""
        shape = _Shape(self, stage, frozenset(), "")
        return shape.footprint(shape.option(None, 0.0), expandable=self.expandable).reserved_bytes

    def _fastest(self, shape: _Shape) -> StagePlan | None:
        """The fastest way to make it fit; None if there is none."""
        if shape.rest_bytes > self.budget or not (options := shape.fitting):
            return None
        ways = sorted(((shape.finished(option), option) for option in options), key=lambda way: way[0].total_us)
        return next((plan for way in ways if (plan := shape.reserving(*way)).fits), None)

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
            shape = _Shape(self, plan.stage, whole, plan.offload)
            if shape.rest_bytes > self.budget or not (option := shape.fitted(plan.moved_share)).fits:
                break
            if (found := shape.finished(option)).total_us < best.total_us:
                best = min(best, shape.reserving(found, option), key=lambda p: (not p.fits, p.total_us))
        return best


@dataclass(frozen=True)
class _Option:
    """One way to make a step fit: computing again what is not worth a price, moving a share of what waits."""

    price: float | None
    moved_share: float
    peak_bytes: dict[str, int]
    host_bytes: int
    fits: bool
    has_headroom: bool

    @property
    def total_bytes(self) -> int:
        return sum(self.peak_bytes.values())


class _Shape:
    """A model at one stage, with so much at rest on the host: what is left to choose is how values wait."""

    def __init__(self, planner: Planner, stage: int, whole: frozenset[str], place: str) -> None:
        self.planner, self.stage, self.whole, self.place = planner, stage, whole, place
        context = Context(
            mesh=planner.mesh,
            costs=planner.costs,
            groups_calls=True,
            reduce_dtype=planner.reduce_dtype,
            hints=planner.hints,
        )
        self.samples = planner.samples.changed(self._marked)
        steps = parse_recipe(planner.recipe(stage)).passes
        self.members = [Member(graph, steps, context) for graph in self.samples.members]
        self.rest = self.samples.scale_by_key([at_rest(m.placed) for m in self.members])
        if planner.codes:
            kept = [feedback_bytes(m.placed) if planner.codes.gradients else 0 for m in self.members]
            for step in steps:
                if isinstance(step, Compress | CodeGathers):
                    copies = [
                        copies_bytes(m.placed, step.copied, with_own=isinstance(step, Compress)) for m in self.members
                    ]
                    kept = [one + more for one, more in zip(kept, copies, strict=True)]
            self.rest["optimizer"] += int(self.samples.scale(kept))
        if planner.kernels == "auto" and self._has_no_room_for_logits(context):
            steps = tuple(_Blockwise() if isinstance(step, Fuse) else step for step in steps)
            self.members = [Member(graph, steps, context) for graph in self.samples.members]

    def _has_no_room_for_logits(self, context: Context) -> bool:
        """Whether `fuse` of the whole model would take the loss block by block: see `zgraph.passes.fuse`."""
        alive = []
        for captured in self.samples.members:
            graph = Canonicalize().run(captured, context)
            loss = loss_nodes(graph)
            moments = step_memory(graph, context).moments if loss else ()
            alive.append(max((m.total_bytes for m in moments if m.node in loss), default=0))
        return self.samples.scale(alive) > self.planner.budget - self.rest_bytes

    def _marked(self, graph: Graph) -> Graph:
        inputs = tuple(
            replace(i, stage=0 if i.target in self.whole else i.stage, offload=self.place, cuts=self._cuts(i))
            if i.kind is InputKind.param
            else i
            for i in graph.inputs
        )
        return replace(graph, inputs=inputs)

    def _cuts(self, entry: Input) -> tuple[tuple[str, Placement], ...]:
        """How a parameter is cut over ranks of tensor parallelism, where that is stated, and sharded over ranks with
        parts of a batch, along a dim that a search may cut too.
        """
        planner, cut = self.planner, self.planner.placed.get(entry.target)
        if cut is not None:
            entry = replace(entry, cuts=(*entry.cuts, ("tensor", cut)))
        sizes = {"tensor": planner.tensor, "context": planner.context, "expert": planner.expert}
        sharded, is_expert = bool(self.stage) and entry.target not in self.whole, entry.target in planner.experts
        rest = rest_axes(sizes, sharded=sharded, is_expert=is_expert)
        in_blocks = cut.dim if cut is not None and len(cut.blocks) > 1 else None
        left = tuple(
            size // planner.tensor if d != in_blocks and isinstance(size, int) and size % planner.tensor == 0 else 0
            for d, size in enumerate(entry.value.tensor.shape)
        )
        return (*entry.cuts, *cuts_at_rest(left, (), sizes, rest))

    @cached_property
    def shares(self) -> list[float]:
        """Parts of what waits that may move: what the link carries while the forward computes, and all."""
        base = self.members[0]
        hidden = base.forward.hidden_bytes
        saved = Saved(base.placed, base.context)
        waiting = sum(saved.num_bytes.values())
        return [hidden / waiting, 1.0] if hidden < waiting and saved.first(hidden) else [1.0]

    @property
    def rest_bytes(self) -> int:
        """Bytes at rest on the device."""
        return sum(self.rest[name] for name in RESTING)

    @cached_property
    def smallest(self) -> _Option:
        """The way that needs the fewest bytes of the device: all that may be is moved, the rest computed again where
        that helps; nothing is moved where the host has no room for all."""
        moved_share = 1.0 if self.planner.moves else 0.0
        ways = [self.option(price, moved_share) for price in (self.prices[0], self.prices[-1])]
        if moved_share and not any(option.has_headroom for option in ways):
            ways = [self.option(price, 0.0) for price in (self.prices[0], self.prices[-1])]
        return min(ways, key=lambda option: (not option.has_headroom, option.total_bytes))

    @property
    def fitting(self) -> list[_Option]:
        """Ways that fit: nothing moved; and where that computes again, as much moved as is hidden, and all."""
        found = [self.fitted(0.0)]
        if self.planner.moves and (not found[0].fits or found[0].price is not None):
            found += [self.fitted(share) for share in self.shares]
        return [option for option in found if option.fits] or [self.smallest] * self.smallest.fits

    @cached_property
    def prices(self) -> list[float | None]:
        """Prices of a byte, between which some block's choice changes; at none all is kept that the user has not
        marked. Those that the user leaves: none, or the highest.
        """
        if self.planner.recomputes == "never":
            return [None]
        found = self.members[0].forward.prices()
        return [found[-1]] if self.planner.recomputes == "always" else [None, *found]

    def option(self, price: float | None, moved_share: float) -> _Option:
        """Option at this price and moved share: its bytes, and whether it fits."""
        planner = self.planner
        peak_bytes, host_bytes = self.peak(price, moved_share)
        has_headroom = planner.host_budget is None or host_bytes <= planner.host_budget
        fits = has_headroom and sum(peak_bytes.values()) <= planner.budget
        return _Option(price, moved_share, peak_bytes, host_bytes, fits, has_headroom)

    def fitted(self, moved_share: float) -> _Option:
        """The way that computes as little again as the budget asks for."""
        most = self.option(self.prices[0], moved_share)
        if most.fits:
            return most
        chosen = self.option(self.prices[-1], moved_share)
        low, high = 0, len(self.prices) - 1  # the first price at which it fits is in (low, high]
        while chosen.fits and high - low > 1:
            middle = (low + high) // 2
            tried = self.option(self.prices[middle], moved_share)
            low, high, chosen = (low, middle, tried) if tried.fits else (middle, high, chosen)
        return chosen

    def finished(self, option: _Option) -> StagePlan:
        """The plan of one way to fit, with its times."""
        planner = self.planner
        figures = [m.figures(option.price, option.moved_share, planner.accumulation) for m in self.members]
        step_us, exposed_us, sent, flop = (self.samples.scale(f) for f in zip(*figures, strict=True))
        usual = self.samples.scale([m.flop for m in self.members])
        return StagePlan(
            stage=self.stage,
            whole=self.whole,
            offload=self.place,
            moved_share=option.moved_share,
            rest_bytes={name: self.rest[name] for name in RESTING},
            peak_bytes=option.peak_bytes,
            host_bytes=option.host_bytes,
            needed_bytes=min(self.smallest.total_bytes, option.total_bytes),
            step_us=step_us,
            update_us=self.update_us,
            exposed_us=exposed_us,
            sent_bytes=int(sent),
            flop=usual * planner.accumulation,
            again_share=flop / usual - 1 if usual else 0.0,
            fits=option.fits,
            time=time_interval(step_us + self.update_us, self.members[0].placed, planner.costs, {}),
            memory=memory_interval(option.total_bytes, planner.costs),
        )

    def footprint(self, option: _Option, *, expandable: bool) -> Footprint:
        """Memory that a GPU's allocator reserves for one way to fit."""
        planner = self.planner
        return scaled_footprint(
            self.samples,
            [m.plan(option.price, option.moved_share, planner.accumulation) for m in self.members],
            planner.hints,
            option.total_bytes,
            planner.num_ranks,
            expandable=expandable,
            library_bytes=planner.library_bytes,
        )

    def reserving(self, plan: StagePlan, option: _Option) -> StagePlan:
        """The plan of one way to fit with what is reserved for it. It fits if the device has room for what expandable
        segments would reserve: where the others reserve more, they give it back, which takes time."""
        planner = self.planner
        if not planner.costs.hardware.has_host:
            return plan
        found = self.footprint(option, expandable=planner.expandable)
        least = found if planner.expandable else self.footprint(option, expandable=True)
        has_room = planner.room_bytes is None or min(least.reserved_bytes, found.reserved_bytes) <= planner.room_bytes
        return replace(
            plan,
            fits=plan.fits and has_room,
            reserved=memory_interval(found.reserved_bytes, planner.costs),
            beside_bytes=found.beside_bytes,
        )

    def peak(self, price: float | None, moved_share: float) -> tuple[dict[str, int], int]:
        """Bytes on the device by category at the peak of the step, and bytes on the host."""
        found = [m.peaks(price, moved_share) for m in self.members]
        parts = [self.samples.scale_by_key([m[part].bytes_by_category for m, _ in found]) for part in (0, 1)]
        if self.planner.accumulation > 1:  # what micro-steps before have left lies beside what this one makes
            before = int(self.samples.scale([m.accumulated_bytes for m in self.members]))
            parts = [{**part, "gradients": part.get("gradients", 0) + before} for part in parts]
        highest = max([*parts, {"gradients": self.update_bytes}], key=lambda m: sum(m.values()))
        on_host = self.rest["host"] + int(self.samples.scale([on_host for _, on_host in found]))
        rest = {name: self.rest[name] for name in RESTING}
        return {**dict.fromkeys(CATEGORIES, 0), **highest, **rest}, on_host

    @property
    def update_bytes(self) -> int:
        """Bytes of gradients, and of what torch's AdamW takes beside them: on a GPU one more copy of all."""
        if self.planner.costs.hardware.has_host:
            return self.rest["optimizer"]
        return self.rest["optimizer"] // 2 + max(update_scratch(m.placed) for m in self.members)

    @property
    def update_us(self) -> float:
        """AdamW's update, as fast as memory lets it: the device's, or where it runs on the host, that of the link."""
        costs = self.planner.costs
        if not self.place:
            return costs.update_us(self.rest["masters"])
        return 1e6 * UPDATE_PASSES * self.rest["masters"] / costs.hardware.host_link.bytes_per_s


@dataclass(frozen=True)
class _Blockwise(Fuse):
    """`fuse` where the logits have no room, and nothing was measured: the loss is taken block by block."""

    def run(self, graph: Graph, context: Context) -> Graph:
        return DeadCode().run(fused_losses(graph, self.name), context)
