"""Prices of a search, in microseconds, all by the cost table of the hardware.

    a node       its time on its part, as the step's simulation has it: a roofline of FLOP and bytes, or as measured
    a reshard    its collective along the axis, or the copy that a slice is
    a parameter  AdamW's update of what a rank has of it, and what its ZeRO stage sends of that along the data axes

Nothing hides behind anything else: the sum is the step's time if every transfer were waited for.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from zgraph.cost.forms import ROUNDS
from zgraph.cost.rest import UPDATE_PASSES
from zgraph.ir import OPS, Arg, Axis, Graph, Input, Mesh, Node, Placement, Replicate, Shard, TensorType, Type, Value
from zgraph.ir.axis_rules import collective
from zgraph.ir.graph import map_values
from zgraph.ir.parts import part_along
from zgraph.ir.rules import Strategy
from zgraph.ir.symbols import evaluate
from zgraph.ir.types import num_data_ranks, num_shards
from zgraph.passes.core.base import Context

__all__ = ["Prices"]

R = Replicate()

DEFAULT_STAGE = 3


@dataclass(frozen=True)
class Prices:
    """Prices along one axis.

    Args:
        graph: on whole tensors.
        axis: the axis.
        context: the hardware, and the data axes.
    """

    graph: Graph
    axis: Axis
    context: Context
    _moved: dict[tuple[TensorType, Placement, Placement], tuple[float, int]] = field(default_factory=dict, repr=False)

    @property
    def mesh(self) -> Mesh:
        """The axis, and the data axes behind it."""
        data = tuple(a for a in self.context.mesh if a.name in ("replicate", "shard"))
        return (self.axis, *(data or (Axis("shard", 1),)))

    def local(self, kind: Type, place: Placement | None) -> Type:
        """The type of a rank's part."""
        if not isinstance(kind, TensorType):
            return kind
        return part_along(kind.at(*(R for _ in self.mesh)), 0, self.axis.size, place or R)

    def node_us(self, node: Node, strategy: Strategy) -> float:
        """Time of a node that goes this way."""
        parts = {
            v.name: Value(v.name, self.local(v.type, place))
            for v, place in zip(node.operands, strategy.ins, strict=True)
        }
        results = tuple(
            Value(v.name, self.local(v.type, place)) for v, place in zip(node.results, strategy.outs, strict=True)
        )
        args = tuple(map_values(a, parts) for a in node.args)
        kwargs = tuple((key, map_values(a, parts)) for key, a in node.kwargs)
        made = replace(node, args=args, kwargs=kwargs, results=results)
        return self.context.costs.node_us(self.graph, made, self.context.hints)

    def moved_us(self, kind: TensorType, old: Placement, new: Placement) -> float:
        """Time to bring a value from one placement to another; infinite if nothing does."""
        return self._reshard(kind, old, new)[0]

    def sent_bytes(self, kind: TensorType, old: Placement, new: Placement) -> int:
        """Bytes that a rank sends for that."""
        return self._reshard(kind, old, new)[1]

    def _reshard(self, kind: TensorType, old: Placement, new: Placement) -> tuple[float, int]:
        key = (kind, old, new)
        if key not in self._moved:
            self._moved[key] = self._asked(kind, old, new)
        return self._moved[key]

    def _asked(self, kind: TensorType, old: Placement, new: Placement) -> tuple[float, int]:
        if old == new:
            return 0.0, 0
        op = collective(old, new)
        if not op:
            return float("inf"), 0
        options: list[tuple[str, Arg]] = [("axis", self.axis.name)]
        if isinstance(new, Shard):
            options.append(("dim", new.dim))
        made = self.local(kind, new)
        assert isinstance(made, TensorType)
        is_start = op.endswith("_start")
        operand, result = Value("x", self.local(kind, old)), Value("y", made.promised() if is_start else made)
        node = Node(op, (operand,), (result,), tuple(options))
        graph = replace(self.graph, mesh=self.mesh)
        if not is_start:
            return self.context.costs.node_us(graph, node, self.context.hints), 0
        us = self.context.costs.transfer_us(graph, node, self.context.hints)
        return us, OPS[op].wire_bytes(node, self.mesh)

    def at_rest_us(self, entry: Input, place: Placement) -> float:
        """Time that a parameter takes at a placement: its update, and its gathers and reductions along data axes."""
        kind = entry.value.type
        if not isinstance(kind, TensorType):
            return 0.0
        costs, shards = self.context.costs, num_shards(self.mesh)
        stage = DEFAULT_STAGE if entry.stage is None else entry.stage
        numel = evaluate(kind.numel, self.context.hints) / (self.axis.size if isinstance(place, Shard) else 1)
        masters = numel * (entry.master or kind.dtype).itemsize / (shards if stage else 1)
        us = 1e6 * UPDATE_PASSES * masters / costs.hardware.device.memory_bytes_per_s
        if num_data_ranks(self.mesh) > 1:
            line, sent = costs.gather_alpha_beta(self.mesh), numel * kind.dtype.itemsize * (1 - 1 / shards)
            us += 1e6 * ROUNDS[stage] * sent / line.bytes_per_s
        return us
