"""The plan: what the runtime executes. Programs of instructions, each with its lane and what dies after it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from zgraph.ir.graph import Graph, InputKind, Node, Value
from zgraph.ir.op_rows import Lane
from zgraph.ir.ops import OPS
from zgraph.ir.printer import fingerprint


@dataclass(frozen=True, slots=True)
class Instruction:
    """One node, with the values whose last use it is: they are dropped right after it."""

    node: Node
    frees: tuple[str, ...] = ()

    @property
    def lane(self) -> Lane:
        op = OPS.get(self.node.op)
        return op.lane if op else "compute"


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """A straight line of instructions from arguments to results.

    `arguments` are dropped as soon as nothing reads them any more; a result of None is returned as None. `arena_bytes`
    are taken before the first instruction: the graph's arena for this program, if anything in it lies there.
    """

    name: str
    arguments: tuple[Value, ...]
    instructions: tuple[Instruction, ...]
    results: tuple[Value | None, ...]
    arena_bytes: int = 0

    @property
    def unread(self) -> tuple[str, ...]:
        """The arguments that nothing reads, by name: they are dropped before the first instruction."""
        read = {v.name for i in self.instructions for v in i.node.operands}
        read |= {v.name for v in self.results if v is not None}
        return tuple(v.name for v in self.arguments if v.name not in read)


@dataclass(frozen=True)
class Plan:
    """Everything that the runtime needs to run one captured graph.

    Args:
        graph: the graph after all passes.
        forward: from the call's inputs to its outputs, followed by `saved`.
        backward: from `saved` and the tangents to the gradients; None where there is no backward.
        unsynced: the backward under no_sync: gradients of stages 0 and 1 stay on the rank, whole. None as above.
        saved: the values that live from the forward to the backward.
        zero_tangents: those that `loss_only` takes as zero: all but the loss's, where the model returns more than it.
        loss_only: the backward, synced and unsynced, without these tangents; None where there are none to leave out.
    """

    graph: Graph
    forward: Program
    backward: Program | None
    unsynced: Program | None
    saved: tuple[Value, ...]
    zero_tangents: frozenset[str] = frozenset()
    loss_only: tuple[Program, Program] | None = None

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the program: equal on two ranks only if they run the same ops on the same shapes."""
        return fingerprint(self.graph)

    @cached_property
    def collectives(self) -> tuple[Node, ...]:
        """Every collective of one step, in the order in which it is issued."""
        return tuple(n for n in self.graph.nodes if n.op in OPS and OPS[n.op].lane == "comm")

    @cached_property
    def resident(self) -> frozenset[str]:
        """Names of the values that live in the model, not in the call: parameters and lifted constants."""
        kinds = (InputKind.param, InputKind.constant)
        return frozenset(i.value.name for i in self.graph.inputs if i.kind in kinds)
