"""The base class of passes: a frozen dataclass whose fields are its options, a contract, and one pure `run`."""

from __future__ import annotations

import abc
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from zgraph.cost import CostTable
from zgraph.cost.defaults import default_costs
from zgraph.cost.memory import ALLOCATION_BYTES
from zgraph.ir import Axis, DType, Graph

Choice = Literal["never", "auto", "always"]


class Numerics(enum.Enum):
    """The effect of a pass on numerical results."""

    exact = "exact"
    reassociates = "reassociates"
    approximate = "approximate"


def rounded_down(num_bytes: int) -> int:
    """Bytes in whole allocations."""
    return num_bytes // ALLOCATION_BYTES * ALLOCATION_BYTES


@dataclass(frozen=True)
class Context:
    """Facts that passes may use beside the graph: data, never a clock, a device or the environment.

    Args:
        mesh: the mesh axes that the model is sharded over; empty for one rank.
        reduce_dtype: the dtype in which gradients are summed over ranks; None keeps the gradient's own.
        hints: a number for each symbolic size, as seen at capture.
        costs: durations of ops and collectives on the hardware at hand.
        memory_budget: bytes that one rank may have alive; None sets no limit.
        rest_bytes: bytes of them at rest: parameters, the optimizer's state, buffers.
        update_bytes: bytes that the optimizer's step has alive above them: gradients, and what it takes to compute.
        fit_bytes: bytes above rest that `fit` and `keep` go by; None leaves them all that the budget does.
        groups_calls: whether the runtime can move many tensors in one call, from and to where they are. Buckets are
            packed where it cannot.
        keeps_blocks: whether the device's allocator keeps freed memory in blocks, which fragment.
        recomputes: whether values of the forward are computed again in the backward: where the budget asks for it,
            never, or always.
        offloads: whether they wait for the backward in the host's memory, likewise.
        lowering: the passes of the pipeline at hand that lower reshards, for passes that look ahead; set by the
            pipeline, and in no file. Empty takes zgraph's own.
    """

    mesh: tuple[Axis, ...] = ()
    reduce_dtype: DType | None = None
    hints: Mapping[str, int] = field(default_factory=dict)
    costs: CostTable = field(default_factory=default_costs)
    memory_budget: int | None = None
    rest_bytes: int = 0
    update_bytes: int = 0
    fit_bytes: int | None = None
    groups_calls: bool = False
    keeps_blocks: bool = False
    recomputes: Choice = "auto"
    offloads: Choice = "never"
    lowering: Annotated[tuple[Any, ...], Field(exclude=True, max_length=0)] = ()

    @property
    def step_bytes(self) -> int | None:
        """Bytes that a step may have alive above what is at rest; None sets no limit."""
        return None if self.memory_budget is None else self.memory_budget - self.rest_bytes

    @property
    def fitting(self) -> Context:
        """The context for `fit` and `keep`: a budget in whole allocations, all of which is for the step."""
        if self.step_bytes is None:
            return self
        limit = self.step_bytes if self.fit_bytes is None else self.fit_bytes
        return replace(self, memory_budget=max(rounded_down(limit), 0), rest_bytes=0, fit_bytes=None)


@dataclass(frozen=True)
class Pass(abc.ABC):
    """A rewrite of graphs. Subclasses add fields (options), the four class variables, and `run`.

    `requires` and `provides` are the contract: words for what the graph must have gone through before, and what it
    has gone through after. `conflicts` must not have been provided before.
    """

    name: ClassVar[str]
    numerics: ClassVar[Numerics] = Numerics.exact
    requires: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()
    conflicts: ClassVar[frozenset[str]] = frozenset()

    @abc.abstractmethod
    def run(self, graph: Graph, context: Context) -> Graph:
        """The rewritten graph. Pure: the same graph and context always give the same result."""
