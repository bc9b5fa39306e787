"""Shape of a step: a model at one stage, with so much at rest on the host, and the ways in which it is made to fit.

Bytes are followed in two parts of the step: until the backward reaches the first layer, where activations have their
peak, and from there on, where gradients have theirs. Two bounds spare most of the simulations: bytes that are alive
whatever is chosen, and time that is computed whatever is hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from zgraph.cost import memory_interval, time_interval
from zgraph.cost.reserved import Footprint
from zgraph.cost.rest import UPDATE_PASSES, at_rest, copies_bytes, feedback_bytes, update_scratch
from zgraph.estimate.member import Member
from zgraph.estimate.planned_job import PlannedJob
from zgraph.estimate.reservation import scaled_footprint
from zgraph.estimate.stage_figures import StagePlan
from zgraph.ir import Graph, Input, InputKind, Placement, model_axes
from zgraph.options.parallel import cuts_at_rest, rest_axes
from zgraph.passes import Context, Pass, parse_recipe
from zgraph.passes.code_gathers import CodeGathers
from zgraph.passes.compress import Compress
from zgraph.passes.dce import DeadCode
from zgraph.passes.fuse import Fuse
from zgraph.passes.fusion.loss import fused_losses
from zgraph.passes.offload import Saved
from zgraph.passes.partition import Partition

RESTING = ("parameters", "optimizer", "buffers")
CATEGORIES = (*RESTING, "gradients", "activations", "gathered", "temporaries", "buckets")


@dataclass(frozen=True)
class Option:
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


class Shape:
    """A model at one stage, with so much at rest on the host: what is left to choose is how values wait."""

    def __init__(self, planner: PlannedJob, stage: int, whole: frozenset[str], place: str) -> None:
        self.planner, self.stage, self.whole, self.place = planner, stage, whole, place
        self.samples = planner.samples
        self._options: dict[tuple[float | None, float], Option] = {}

    @cached_property
    def steps(self) -> tuple[Pass, ...]:
        """The passes; `fuse` of the whole model takes the loss block by block where logits have no room."""
        steps, planner = self._usual_steps, self.planner
        if planner.kernels == "auto" and planner.unplaced.logit_bytes > planner.budget - self.rest_bytes:
            return tuple(Blockwise() if isinstance(step, Fuse) else step for step in steps)
        return steps

    @cached_property
    def _usual_steps(self) -> tuple[Pass, ...]:
        return parse_recipe(self.planner.recipe(self.stage)).passes

    @cached_property
    def members(self) -> list[Member]:
        """The samples at this stage."""
        return self._members(self.steps)

    def _members(self, steps: tuple[Pass, ...]) -> list[Member]:
        samples, left = self.planner.unplaced.ready(steps)
        return [Member(self._marked(graph), left, self.planner.pass_context) for graph in samples.members]

    @cached_property
    def rest(self) -> dict[str, int]:
        """Bytes at rest by category, on the host and of masters too."""
        planner, steps = self.planner, self._usual_steps
        if not planner.codes and not model_axes(planner.mesh):  # parameters are placed whatever reads them
            place = next(step for step in steps if isinstance(step, Partition))
            inputs = (replace(self._marked(graph), nodes=(), outputs=()) for graph in self.samples.members)
            return self.samples.scale_by_key([at_rest(place.run(graph, planner.pass_context)) for graph in inputs])
        placed = [member.placed for member in self._members(steps)]
        rest = self.samples.scale_by_key(list(map(at_rest, placed)))
        if planner.codes:
            kept = [feedback_bytes(graph) if planner.codes.gradients else 0 for graph in placed]
            for step in steps:
                if isinstance(step, Compress | CodeGathers):
                    with_own = isinstance(step, Compress)
                    copies = [copies_bytes(graph, step.copied, with_own=with_own) for graph in placed]
                    kept = [one + more for one, more in zip(kept, copies, strict=True)]
            rest["optimizer"] += int(self.samples.scale(kept))
        return rest

    @cached_property
    def gathered_bytes(self) -> int:
        """Bytes that are gathered where the forward ends, whatever is chosen: at stages 1 and 2 what is gathered for
        the forward stays for the backward. No more than that is known of what is coded or cut."""
        planner = self.planner
        is_sharded = planner.num_ranks > planner.num_copies
        if self.stage not in (1, 2) or not is_sharded or planner.compute or model_axes(planner.mesh):
            return 0
        read = planner.unplaced.read_later(self.steps)
        return int(self.samples.scale([sum(n for name, n in of.items() if name not in self.whole) for of in read]))

    @property
    def may_fit(self) -> bool:
        """Whether what is alive whatever is chosen has room."""
        host_budget = self.planner.host_budget
        has_headroom = host_budget is None or self.rest["host"] <= host_budget
        return (
            has_headroom
            and self.rest_bytes <= self.planner.budget
            and self.rest_bytes + self.gathered_bytes <= self.planner.budget
        )

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
    def smallest(self) -> Option:
        """The way that needs the fewest bytes of the device: all that may be is moved, the rest computed again where
        that helps; nothing is moved where the host has no room for all."""
        moved_share = 1.0 if self.planner.moves else 0.0
        ways = [self.option(price, moved_share) for price in (self.prices[0], self.prices[-1])]
        if moved_share and not any(option.has_headroom for option in ways):
            ways = [self.option(price, 0.0) for price in (self.prices[0], self.prices[-1])]
        return min(ways, key=lambda option: (not option.has_headroom, option.total_bytes))

    @property
    def fitting(self) -> list[Option]:
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

    @property
    def lowest_price(self) -> float | None:
        """The first of the prices."""
        return self.prices[0] if self.planner.recomputes == "always" else None

    def option(self, price: float | None, moved_share: float) -> Option:
        """Option at this price and moved share: its bytes, and whether it fits."""
        key = price, moved_share
        if key not in self._options:
            self._options[key] = self._option(price, moved_share)
        return self._options[key]

    def _option(self, price: float | None, moved_share: float) -> Option:
        planner = self.planner
        peak_bytes, host_bytes = self.peak(price, moved_share)
        has_headroom = planner.host_budget is None or host_bytes <= planner.host_budget
        fits = has_headroom and sum(peak_bytes.values()) <= planner.budget
        return Option(price, moved_share, peak_bytes, host_bytes, fits, has_headroom)

    def fitted(self, moved_share: float) -> Option:
        """The way that computes as little again as the budget asks for."""
        most = self.option(self.lowest_price, moved_share)
        if most.fits:
            return most
        chosen = self.option(self.prices[-1], moved_share)
        low, high = 0, len(self.prices) - 1  # the first price at which it fits is in (low, high]
        near = self._first_below(most.total_bytes, chosen.total_bytes) if chosen.fits else high
        for middle in (near, near - 1, near + 1):
            if chosen.fits and low < middle < high:
                tried = self.option(self.prices[middle], moved_share)
                low, high, chosen = (low, middle, tried) if tried.fits else (middle, high, chosen)
        while chosen.fits and high - low > 1:
            middle = (low + high) // 2
            tried = self.option(self.prices[middle], moved_share)
            low, high, chosen = (low, middle, tried) if tried.fits else (middle, high, chosen)
        return chosen

    def _first_below(self, most_bytes: int, least_bytes: int) -> int:
        """The first price at which the step probably fits, if its bytes go from most to least as those kept do."""
        kept = [self.samples.scale([m.kept_bytes(price) for m in self.members]) for price in self.prices]
        share = max(self.planner.budget - least_bytes, 0) / max(most_bytes - least_bytes, 1)
        limit = kept[-1] + share * (kept[0] - kept[-1])
        return next(i for i, num_bytes in enumerate(kept) if num_bytes <= limit or i == len(kept) - 1)

    def computing_us(self, price: float | None) -> float:
        """Microseconds that a step computes at a price, however well all else is hidden; 0 where gathers change it."""
        if self.planner.compute:
            return 0.0
        return self.planner.accumulation * self.samples.scale([m.computing_us(price) for m in self.members])

    def least_us(self, price: float | None) -> float:
        """Microseconds below which no plan at a price is, with its update."""
        return self.computing_us(price) + self.update_us

    def finished(self, option: Option) -> StagePlan:
        """The plan of one way to fit, with its times, and without what it needs at least and reserves."""
        planner = self.planner
        figures = [m.figures(option.price, option.moved_share, planner.accumulation) for m in self.members]
        step_us, exposed_us, sent, flop = (self.samples.scale(f) for f in zip(*figures, strict=True))
        step_us = max(step_us, self.computing_us(option.price))  # what samples hide differs
        usual = self.samples.scale([m.flop for m in self.members])
        return StagePlan(
            stage=self.stage,
            whole=self.whole,
            offload=self.place,
            moved_share=option.moved_share,
            rest_bytes={name: self.rest[name] for name in RESTING},
            peak_bytes=option.peak_bytes,
            host_bytes=option.host_bytes,
            needed_bytes=option.total_bytes,
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

    def footprint(self, option: Option, *, expandable: bool) -> Footprint:
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

    def reserving(self, plan: StagePlan, option: Option) -> StagePlan:
        """The plan of one way to fit with what is needed at least and what is reserved for it.

        It fits if the device has room for what expandable segments would reserve: where the others reserve more, they
        give it back, which takes time.
        """
        planner = self.planner
        plan = replace(plan, needed_bytes=min(self.smallest.total_bytes, option.total_bytes))
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
        parts += [{"gradients": self.update_bytes}, {"gathered": self.gathered_bytes}]
        highest = max(parts, key=lambda m: sum(m.values()))
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
class Blockwise(Fuse):
    """`fuse` where the logits have no room, and nothing was measured: the loss is taken block by block."""

    def run(self, graph: Graph, context: Context) -> Graph:
        return DeadCode().run(fused_losses(graph, self.name), context)
