"""Cut parameters along a model axis, and have every op compute on parts of them.

Two ranks of an axis `tensor`, `%w` cut by columns and `%v` by rows, as the model's plan for tensor parallelism has it:

    param %w: f32[32, 64] "up" tensor=S1           param %w: f32[32, 32]<S1, R> "up" tensor=S1
    param %v: f32[64, 32] "down" tensor=S0         param %v: f32[32, 32]<S0, R> "down" tensor=S0
    fwd %h: f32[4, 64] = aten.mm(%x, %w)     ->    fwd %h: f32[4, 32]<S1, R> = aten.mm(%x, %w)
    fwd %a: f32[4, 64] = aten.silu(%h)             fwd %a: f32[4, 32]<S1, R> = aten.silu(%h)
    fwd %y: f32[4, 32] = aten.mm(%a, %v)           fwd %y: f32[4, 32]<P(sum), R> = aten.mm(%a, %v)
                                                   fwd %y_R: f32[4, 32]<R, R> = reshard(%y)

Where values live follows from where the parameters do, by the table of sharding rules (`zgraph/ir/rules`); a reshard
stands where a value must be elsewhere. Types and sizes among arguments are those of a rank's part from here on. What
comes out of the model is whole, but for rows along an axis of experts, and a gradient lies as its parameter does.
`partition` goes on with what is left of each parameter, along the data axes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from zgraph.errors import PlacementError
from zgraph.ir import (
    MODEL_AXES,
    Arg,
    Axis,
    Builder,
    Graph,
    Input,
    InputKind,
    Node,
    Output,
    OutputKind,
    Partial,
    Phase,
    Placement,
    Replicate,
    Shard,
    TensorType,
    Type,
    Value,
    model_axes,
)
from zgraph.ir.external_ops import CAST
from zgraph.ir.graph import map_values
from zgraph.ir.layout import dense_strides, is_contiguous
from zgraph.ir.ops import views
from zgraph.ir.parts import part_along
from zgraph.ir.rules import ROUTED, Call, Strategy, on_parts, rule_of
from zgraph.passes.analysis.expert_rows import choose_by_experts
from zgraph.passes.analysis.placing import choose, wire_bytes
from zgraph.passes.analysis.sequences import choose_along_sequence
from zgraph.passes.core.base import Context, Numerics, Pass
from zgraph.passes.placements import Search

R, P = Replicate(), Partial("sum")

PARTS_OF_BATCH = ("context", "expert")
"""Axes whose ranks each compute a part of the batch, with whole parameters but for experts."""


@dataclass(frozen=True)
class Place(Pass):
    """Cut parameters along a model axis, and have every op compute on parts of them.

    Args:
        axis: the name of the axis. Where the mesh has none of this name, nothing is done. Along `context`, the sequence
            of inputs is cut, along `expert` their rows, and parameters are whole where they are used, but for experts.
        sequence: whether activations between blocks lie cut along the sequence: a reduce-scatter behind what makes a
            partial sum, a gather before what needs it whole, and again in the backward.
        search: what is searched for the least time on the hardware of the context, as an integer program: `all`, or
            with parameters where they are stated, `values`. Without it each node in order takes the way that sends the
            fewest bytes. It finds where activations lie cut along the sequence on its own.
        ring: along `context`, whether keys and values of attention go round the ranks wherever they can, and not only
            where heads do not divide.
    """

    axis: str = "tensor"
    sequence: bool = False
    search: str = ""
    ring: bool = False

    name: ClassVar[str] = "place"
    numerics: ClassVar[Numerics] = Numerics.reassociates
    conflicts: ClassVar[frozenset[str]] = frozenset({"placed"})

    def __post_init__(self) -> None:
        if self.axis not in MODEL_AXES:
            raise ValueError(f"axis must be one of {', '.join(MODEL_AXES)}, not {self.axis}")
        if self.search not in ("", "values", "all"):
            raise ValueError(f"search must be values or all, not {self.search}")
        if self.axis in PARTS_OF_BATCH and (self.search or self.sequence):
            what = "the sequence" if self.axis == "context" else "the batch"
            raise ValueError(f"along {self.axis}, what is cut is {what}: leave search and sequence out")
        if self.ring and self.axis != "context":
            raise ValueError("keys and values go round the ranks of context: leave ring out")
        if self.search and self.sequence:
            raise ValueError("what is searched decides where the sequence is cut: leave sequence out")

    def run(self, graph: Graph, context: Context) -> Graph:
        size = next((a.size for a in model_axes(context.mesh) if a.name == self.axis), 1)
        if size == 1:
            return graph
        axis = Axis(self.axis, size)
        seeds = {i.value.name: place for i in graph.inputs for name, place in i.cuts if name == self.axis}
        search = partial(Search, context=context, free=self.search == "all") if self.search else None
        return _Placer(graph, axis, seeds, search, sequence=self.sequence, ring=self.ring).run()


class _Placer:
    """One run of the pass."""

    def __init__(
        self,
        graph: Graph,
        axis: Axis,
        seeds: Mapping[str, Placement],
        search: Callable[..., Search] | None = None,
        *,
        sequence: bool = False,
        ring: bool = False,
    ) -> None:
        if wrong := next((n for n in graph.nodes if n.op in graph.foreign and graph.foreign[n.op].writes), None):
            raise PlacementError(
                f"{wrong.op} of {wrong.origin.module or 'the model'} writes to memory, which parts of values on other "
                f"ranks do not see; leave {axis.name} parallelism out, or write the model without it"
            )
        before = model_axes(graph.mesh)
        self.index, self.axis, self.size, self.is_first = len(before), axis.name, axis.size, not graph.mesh
        self.source, self.sequence = graph, sequence
        self.graph = replace(graph, mesh=(*before, axis, Axis("shard", 1)))
        self.seeds = {name: self.checked(graph, name, place, axis) for name, place in seeds.items()}
        self.has_parts = axis.name in PARTS_OF_BATCH
        if self.has_parts:
            choose_parts = choose_by_experts if axis.name == "expert" else partial(choose_along_sequence, ring=ring)
            self.choices = choose_parts(graph, self.seeds, axis.size)
        elif search is None:
            self.choices = choose(graph, self.seeds, axis.size, sequence=sequence)
        else:
            found = search(graph, axis, fixed=self.seeds).found
            self.seeds = {name: place for name, place in found.places.items() if place != R}
            self.choices = found.choices
        self.seeds |= self.choices.given
        self.nodes: list[Node] = []
        self.is_forward = True
        self.have: dict[str, dict[Placement, Value]] = {}

    def checked(self, graph: Graph, name: str, place: Placement, axis: Axis) -> Placement:
        """A seed that its parameter, or input, divides into."""
        entry = next(i for i in graph.inputs if i.value.name == name)
        try:
            part_along(self.whole(entry.value.tensor), self.index, axis.size, place)
        except ValueError:
            shape = tuple(entry.value.tensor.shape)
            raise PlacementError(
                f"{entry.target} of shape {shape} does not divide into {place} on {axis.size} ranks of {axis.name}; "
                "place it on another dim, keep it whole, or take another number of ranks"
            ) from None
        return place

    def whole(self, kind: TensorType) -> TensorType:
        """A type of the captured graph, replicated along the axis."""
        if self.is_first:
            return kind.at(R, R)
        return kind.at(*kind.placement[: self.index], R, *kind.placement[self.index :])

    def typed(self, kind: Type, place: Placement | None) -> Type:
        """A captured type at a placement."""
        if not isinstance(kind, TensorType):
            return kind
        return part_along(self.whole(kind), self.index, self.size, place or R)

    def run(self) -> Graph:
        choices = self.choices
        self.source = choices.graph
        self.graph = replace(self.graph, foreign=self.source.foreign)
        self.builder = Builder(replace(self.graph, nodes=self.source.nodes), Place.name)
        inputs = tuple(map(self.input, self.source.inputs))
        returned = [o for o in self.source.outputs if o.phase is Phase.forward]
        again = self.made_of_parameters() if self.has_parts else frozenset()
        for node, strategy, rule in zip(self.source.nodes, choices.strategies, choices.rules, strict=True):
            if self.is_forward and node.phase is not Phase.forward:
                self.is_forward = False
                self.have = {name: {} if name in again else self.kept(held) for name, held in self.have.items()}
            while returned and node.phase is not Phase.forward:
                self.output(returned.pop())
            if node.name in choices.routed:
                self.route(node, strategy, choices.routed[node.name])
                continue
            if node.results and node.results[0].name in choices.views:
                self.have[node.results[0].name] = {}
                continue
            env = {
                v.name: self.wanted(v, place, node)
                for v, place in zip(node.operands, strategy.ins, strict=True)
                if isinstance(v.type, TensorType)
            }
            results = tuple(
                Value(r.name, self.typed(r.type, place)) for r, place in zip(node.results, strategy.outs, strict=True)
            )
            op, args, options = on_parts(node, rule, strategy, self.axis, self.size)
            self.nodes.append(
                replace(
                    node,
                    op=op,
                    args=tuple(map_values(a, env) for a in args),
                    kwargs=tuple((k, map_values(a, env)) for k, a in options),
                    results=results,
                )
            )
            for result, place in zip(results, strategy.outs, strict=True):
                self.have[result.name] = {place or R: result}
                if (reduced := choices.reduced.get(result.name)) is not None:
                    self.have[result.name] = {reduced: self.wanted(result, reduced, node)}
        outputs = tuple(map(self.output, self.source.outputs))
        return replace(self.graph, inputs=inputs, nodes=tuple(self.nodes), outputs=outputs)

    def kept(self, held: dict[Placement, Value]) -> dict[Placement, Value]:
        """The value of the forward that is kept for the backward: not what is gathered where the sequence is cut."""
        if not self.sequence and not self.has_parts:
            return held
        first, *others = held.items()
        return dict([first, *(o for o in others if self.has_parts and isinstance(o[0], Shard))])

    def made_of_parameters(self) -> frozenset[str]:
        """Views and casts of parameters alone, which the backward makes again of what it gathers."""
        found = set(self.source.param_names)
        where = {n.name: way for n, way in zip(self.source.nodes, self.choices.strategies, strict=True)}
        for node in self.source.phase_nodes(Phase.forward):
            is_made = node.operands and all(v.name in found for v in node.operands) and len(node.results) == 1
            is_made = is_made and not isinstance(where[node.name].outs[0], Shard)  # matrices of experts
            if is_made and (node.op == CAST or views(self.source, node)):
                found.add(node.name)
        return frozenset(found - set(self.source.param_names))

    def route(self, node: Node, way: Strategy, counts: Value) -> None:
        """Rows to the ranks that have their groups, or from these, in the place of a lookup or a sum by index."""
        tensors = [self.wanted(v, place, node) for v, place in zip(node.operands, way.ins, strict=True)]
        args = (*tensors, self.wanted(counts, R, node))
        result = Value(node.name, self.typed(node.results[0].type, way.outs[0]))
        future = self.builder.value(f"{node.name}_start", result.tensor.promised())
        options: dict[str, Arg] = {"axis": self.axis}
        start = self.builder.typed(ROUTED[node.op], args, (future,), node.phase, node.origin, **options)
        self.nodes += [start, self.builder.typed("wait", (future,), (result,), node.phase, node.origin)]
        self.have[node.name] = {way.outs[0] or R: result}

    def input(self, entry: Input) -> Input:
        place = self.seeds.get(entry.value.name, R)
        value = Value(entry.value.name, self.typed(entry.value.type, place))
        self.have[value.name] = {place: value}
        return replace(entry, value=value)

    def output(self, output: Output) -> Output:
        """An output as the caller wants it: whole, or as what it belongs to lies: a gradient as its parameter, the new
        value of an input as the old one.
        """
        if output.value is None or not isinstance(output.value.type, TensorType):
            return output
        belongs = output.kind in (OutputKind.grad, OutputKind.mutation) and output.target in self.seeds
        due = self.seeds[output.target] if belongs else R
        if output.kind is OutputKind.output:
            due = self.choices.returned.get(output.value.name, R)
        node = Node("", (), (), phase=output.phase)
        if (maker := self.source.producers.get(output.value.name)) is not None:
            node = replace(node, origin=maker.origin)
        return replace(output, value=self.wanted(output.value, due, node))

    def wanted(self, value: Value, place: Placement | None, user: Node) -> Value:
        """A captured value at a placement, brought there before its first user if it is not."""
        have = self.have[value.name]
        if not have and self.has_parts:
            have[R] = self.made_again(value, user)
        if place is None:
            return next(iter(have.values())) if have else self.wanted(value, self.choices.any_place(value.name), user)
        if place in have:
            return have[place]
        if (way := self.choices.ways.get((value.name, place))) is not None:
            have[place] = self.brought(value, place, way, user)
            return have[place]
        kind = self.source_type(value.name)
        source = min(have, key=lambda old: wire_bytes(kind, old, place, self.size))
        stem = f"{value.name}_{_word(place)}"
        result = self.builder.value(stem, self.typed(self.laid(value, kind), place))
        self.insert(self.builder.typed("reshard", (have[source],), (result,), user.phase, user.origin))
        have[place] = result
        return result

    def laid(self, value: Value, kind: TensorType) -> TensorType:
        """The type of a value once it is moved: without the gaps that a part of a fused projection has, if no view of
        it counts on them.
        """
        users = [self.source.nodes[at] for at in self.source.users.get(value.name, ())]
        if not self.has_parts or kind.strides is None or any(views(self.source, user) for user in users):
            return kind
        strides = kind.strides
        if not all(isinstance(stride, int) and stride > 0 for stride in strides):
            return kind
        order = sorted(range(len(strides)), key=lambda dim: (-int(strides[dim]), dim))
        dense = dense_strides(kind.shape, order)
        return replace(kind, strides=None if is_contiguous(kind.shape, dense) else dense)

    def made_again(self, value: Value, user: Node) -> Value:
        """A copy of nodes that read parameters alone, made once more before its first user in the backward."""
        node = self.viewed(value)
        given = {v.name: self.wanted(v, R, user) for v in node.operands}
        result = Value(self.builder.fresh(f"{value.name}_again"), self.typed(value.type, R))
        self.insert(replace(node.substitute(given), results=(result,), phase=user.phase))
        return result

    def viewed(self, value: Value) -> Node:
        """The node that makes a value."""
        return self.source.producers[value.name]

    def brought(self, value: Value, place: Placement, way: tuple[str, Placement], user: Node) -> Value:
        """A value at a placement, by the way that was chosen."""
        name, before = way
        stem = f"{value.name}_{_word(place)}"
        if name == value.name:
            source = self.wanted(value, before, user)
            result = self.builder.value(stem, self.typed(self.source_type(name), place))
            self.insert(self.builder.typed("reshard", (source,), (result,), user.phase, user.origin))
            return result
        node = self.viewed(value)
        rule = rule_of(Call.of(node))
        source = self.wanted(node.operands[0], before, user)
        stem = self.builder.fresh(stem) if self.have[value.name] else value.name
        result = Value(stem, self.typed(value.type, place))
        op, args, options = on_parts(node, rule, Strategy((before,), (place,)), self.axis, self.size)
        args = tuple(map_values(a, {name: source}) for a in args)
        self.insert(replace(node, op=op, args=args, kwargs=options, results=(result,), phase=user.phase))
        return result

    def source_type(self, name: str) -> TensorType:
        """The type of a captured value."""
        maker = self.source.producers.get(name)
        if maker is not None:
            return next(r.tensor for r in maker.results if r.name == name)
        return next(i.value.tensor for i in self.source.inputs if i.value.name == name)

    def insert(self, node: Node) -> None:
        """Put a node behind those that are there; of the forward, before the backward begins."""
        at = len(self.nodes)
        while at and self.nodes[at - 1].phase.rank > node.phase.rank:
            at -= 1
        self.nodes.insert(at, node)


def _word(place: Placement) -> str:
    """A placement as a part of a name."""
    return "_".join(re.findall(r"\w+", str(place)))


def cut_inputs(graph: Graph, axis: str, cuts: Mapping[str, Placement]) -> Graph:
    """The graph with parameters, and inputs of a call, to be cut along an axis, by their names."""
    kinds = InputKind.param, InputKind.input
    return replace(
        graph,
        inputs=tuple(
            replace(i, cuts=((axis, cuts[i.target]),)) if i.kind in kinds and i.target in cuts else i
            for i in graph.inputs
        ),
    )
