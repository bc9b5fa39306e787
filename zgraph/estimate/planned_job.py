"""A model on hardware, as stages of it are planned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from zgraph.codegen import library as _kernels  # noqa: F401 - registers the workspace of ops
from zgraph.cost import CostTable
from zgraph.estimate.layer_scaling import LayerSamples
from zgraph.estimate.unplaced import Unplaced
from zgraph.ir import Axis, DType, Mesh, Shard, model_axes
from zgraph.options.compression import Codes
from zgraph.options.validate import Compute, Kernels
from zgraph.passes import RECIPES, Context, along_model_axes, compressing, recipe_for
from zgraph.passes.core.base import Choice


@dataclass(frozen=True)
class PlannedJob:
    """A model, hardware, and all that is given before a stage is chosen.

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
