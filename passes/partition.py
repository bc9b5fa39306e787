"""State where parameters, gradients and inputs live, and put a reshard where they must be elsewhere.

Stage 3 on two ranks, `%w` the weight, `%g` its gradient:

    param %w: f32[64, 32] "lin.weight"              param %w: f32[64, 32]<S0> "lin.weight" stage=3
    fwd %y = aten.mm.default(%x, %w)          ->    fwd %w_full: f32[64, 32]<R> = reshard(%w)
    bwd %g = aten.mm.default(%xt, %t)               fwd %y: ...<V> = aten.mm.default(%x, %w_full)
                                                    bwd %g: ...<V> = aten.mm.default(%xt, %t)
                                                    bwd %g_pending: ...<P(mean)> = pending(%g, reduce="mean")
                                                    bwd %g_mean: f32[64, 32]<S0> = reshard(%g_pending)

The stage is nothing but this statement (the source of the stages: Rajbhandari et al., ZeRO, SC 2020, section 5):

    stage   parameter at rest   gathered for                       gradient
    0       R                   -                                  P(mean) -> R as it is made
    1       S0                  forward, kept until its last use   P(mean) -> S0 when the step ends
    2       S0                  as 1                               P(mean) -> S0 as it is made
    3       S0                  forward, and again for backward    as 2

A gradient as the backward makes it is each rank's own, V. That the mean of them is meant is said here, once, by
`pending`; from then on the type says it, and no op of a model can read the gradient until it is reduced.

Offloaded state is on the host. The gradient is moved there as soon as it is reduced, for an optimizer that works
there on the master copy. An offloaded parameter is also brought from there whenever it is gathered, in the compute
dtype.

Buffers are replicated. Where the forward changes one (BatchNorm's running mean), the first rank's new value is taken on
every rank (P(root) -> R), so that all ranks evaluate the same and any of them may save it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import ClassVar

from zgraph.errors import ContractError
from zgraph.ir import (
    DEVICE,
    HOST,
    Arg,
    Builder,
    Graph,
    Input,
    InputKind,
    Node,
    Origin,
    Output,
    OutputKind,
    Phase,
    Placement,
    Replicate,
    Shard,
    TensorType,
    Type,
    Value,
    Varying,
    in_use,
    model_axes,
    num_data_ranks,
)
from zgraph.ir.aliases import Memory
from zgraph.ir.external_ops import CAST
from zgraph.ir.graph import map_values, values_in
from zgraph.ir.ops import views
from zgraph.passes.core.base import Context, Numerics, Pass


@dataclass(frozen=True)
class Partition(Pass):
    """State where parameters, gradients and inputs live, and put a reshard where they must be elsewhere.

    Args:
        stage: the stage of the parameters that state none.
        repeat_views: whether the backward makes views of the forward's values again, and they are not kept: to keep a
            value takes the host longer than to make a view.
    """

    stage: int = field(default=3, metadata={"always_printed": True})

    repeat_views: bool = True

    name: ClassVar[str] = "partition"
    numerics: ClassVar[Numerics] = Numerics.reassociates
    provides: ClassVar[frozenset[str]] = frozenset({"placed"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"placed"})

    def __post_init__(self) -> None:
        if self.stage not in range(4):
            raise ValueError(f"stage must be 0, 1, 2 or 3, not {self.stage}")

    def run(self, graph: Graph, context: Context) -> Graph:
        return _Partitioner(graph, context, self.stage, self.repeat_views).run()


class _Partitioner:
    """One run of the pass: walks the nodes in order, with what each captured value has become."""

    def __init__(self, graph: Graph, context: Context, stage: int, repeat_views: bool) -> None:
        mesh = in_use(context.mesh)
        if model_axes(mesh) != model_axes(graph.mesh):
            axes = ", ".join(a.name for a in model_axes(mesh)) or "no model axis"
            raise ContractError(
                f"the mesh has {axes}, but the graph is placed along "
                f"{', '.join(a.name for a in model_axes(graph.mesh)) or 'none'}; put place before partition"
            )
        self.source, self.context, self.repeat_views = graph, context, repeat_views
        self.graph = replace(graph, mesh=mesh)
        self.num_model = len(model_axes(mesh))
        self.builder = Builder(self.graph, Partition.name)
        self.sharded = num_data_ranks(mesh) > 1
        self.inputs = {i.value.name: self.place(i, stage) for i in graph.inputs}
        self.env: dict[Phase, dict[str, Value]] = {p: {} for p in Phase}
        self.derived: set[str] = set()
        self.shared: set[str] = set()
        self.mutations: dict[str, list[int]] = {}
        for index, output in enumerate(graph.outputs):
            if output.kind is OutputKind.mutation and output.value is not None:
                self.mutations.setdefault(output.value.name, []).append(index)
        self.memory = Memory(graph)
        self.written = {
            root
            for node in graph.nodes
            for position in (graph.foreign[node.op].writes if node.op in graph.foreign else ())
            for value in values_in(node.args[position : position + 1])
            for root in self.memory.roots(value.name)
        }
        self.returned = Counter(r for o in graph.outputs if o.value for r in self.memory.roots(o.value.name))
        self.nodes: list[Node] = []
        self.late: list[Node] = []

    def run(self) -> Graph:
        made_in_backward = {r.name for n in self.source.phase_nodes(Phase.backward) for r in n.results}
        due: dict[str, list[int]] = {}
        early: list[int] = []
        for index, output in enumerate(self.source.outputs):
            if self.is_param_grad(output) and output.value is not None:
                if output.value.name in made_in_backward:
                    due.setdefault(output.value.name, []).append(index)
                else:
                    early.append(index)
        outputs = list(self.source.outputs)
        for node in self.source.nodes:
            if node.phase is Phase.backward and early:
                self.reduce_all(early, outputs)
            self.nodes.append(self.rewrite(node))
            self.share_buffers(node, outputs)
            self.reduce_all([index for result in node.results for index in due.get(result.name, ())], outputs)
        self.reduce_all(early, outputs)
        final = tuple(o if self.is_param_grad(o) or self.is_buffer(o) else self.relabel(o) for o in outputs)
        inputs = tuple(self.inputs[i.value.name] for i in self.source.inputs)
        return replace(self.graph, inputs=inputs, nodes=(*self.nodes, *self.late), outputs=final)

    def is_param_grad(self, output: Output) -> bool:
        return output.kind is OutputKind.grad and self.is_param(output.target)

    def is_param(self, name: str) -> bool:
        return name in self.inputs and self.inputs[name].kind is InputKind.param

    # --- where things live at rest -----------------------------------------------------------------------------

    def place(self, entry: Input, default_stage: int) -> Input:
        kind = entry.value.type
        if not isinstance(kind, TensorType):
            return entry
        if entry.kind is not InputKind.param:
            same = entry.kind in (InputKind.constant, InputKind.buffer)
            return replace(entry, value=replace(entry.value, type=self.at(kind, Replicate() if same else Varying())))
        stage = default_stage if entry.stage is None else entry.stage
        rest = kind.contiguous(None if entry.offload else entry.master)
        rest = self.at(rest, Shard(0) if stage > 0 and self.sharded else Replicate())
        rest = rest.on(HOST if entry.offload == "parameters" else DEVICE)
        master = entry.master if entry.offload else None
        return replace(entry, value=replace(entry.value, type=rest), stage=stage, master=master)

    def at(self, kind: TensorType, placement: Placement) -> TensorType:
        """The type at a placement along the shard axis; along model axes it stays."""
        if not self.sharded:
            return kind
        return kind.at(*kind.placement[: self.num_model], *self.everywhere(placement))

    def everywhere(self, placement: Placement) -> tuple[Placement, ...]:
        """A placement along the shard axis with what goes with it along the others: shards are replicated there."""
        others = Replicate() if isinstance(placement, Shard) else placement
        return (*[others] * (len(self.graph.mesh) - self.num_model - 1), placement)

    # --- uses --------------------------------------------------------------------------------------------------

    def rewrite(self, node: Node) -> Node:
        """The node on placed values; whatever it needs of parameters is gathered just before it."""
        env = {v.name: self.needed(v, node) for v in node.operands}
        kinds = [v.type for v in env.values() if isinstance(v.type, TensorType)]
        is_random = node.op in self.source.foreign and self.source.foreign[node.op].random
        varies = is_random or any(k.varies for k in kinds)
        results = tuple(Value(r.name, self.placed_type(r.type, varies)) for r in node.results)
        tensors = [v for v in node.operands if isinstance(v.type, TensorType)]
        if node.phase is Phase.forward and tensors and all(self.comes_again(v.name) for v in tensors):
            if node.op == CAST or views(self.source, node):
                self.derived.update(r.name for r in results)
        for result in results:
            self.env[node.phase][result.name] = result
        return replace(node.substitute(env), results=results)

    def placed_type(self, kind: Type, varies: bool) -> Type:
        return self.at(kind, Varying() if varies else Replicate()) if isinstance(kind, TensorType) else kind

    def comes_again(self, name: str) -> bool:
        """Whether the backward gets this value of the forward from a second gather, not by keeping it."""
        if name in self.derived:
            return True
        entry = self.inputs.get(name)
        return entry is not None and self.is_param(name) and entry.stage == 3 and self.is_elsewhere(entry)

    def is_repeated(self, value: Value) -> bool:
        """Whether the backward makes this view of a value of the forward again."""
        producer = self.source.producers.get(value.name) if self.repeat_views else None
        if producer is None or len(producer.results) != 1 or not views(self.source, producer):
            return False
        if producer.op == "wait":
            return False
        return self.written.isdisjoint(self.memory.roots(value.name))

    def is_elsewhere(self, entry: Input) -> bool:
        """Whether a parameter must be brought to where it is computed with."""
        over_parts = any(axis in ("context", "expert") for axis, _ in entry.cuts)
        return self.sharded or over_parts or entry.value.tensor.is_on_host

    def needed(self, value: Value, user: Node) -> Value:
        """The value that `user` must read in place of the captured `value`."""
        here = self.env[user.phase]
        if value.name in here:
            return here[value.name]
        again = user.phase is Phase.backward and (self.comes_again(value.name) or self.is_repeated(value))
        if not again and user.phase is Phase.backward and value.name in self.env[Phase.forward]:
            return self.env[Phase.forward][value.name]
        if self.is_param(value.name):
            here[value.name] = self.whole(self.inputs[value.name], value.tensor, user)
        elif again:
            here[value.name] = self.derive_again(value, user)
        else:
            here[value.name] = self.inputs[value.name].value
        return here[value.name]

    def whole(self, entry: Input, kind: TensorType, user: Node) -> Value:
        """The parameter as compute wants it: cast from its master, then gathered, from the host if it is there."""
        current, origin = entry.value, user.origin
        stem = f"{entry.value.name}_{'again' if user.phase is Phase.backward else 'full'}"
        if current.tensor.dtype is not kind.dtype:
            current = self.emit("cast", current, f"{entry.value.name}_cast", user.phase, origin, dtype=kind.dtype)
        if self.sharded and current.tensor.is_sharded:
            keep: dict[str, Arg] = {"keep": True} if entry.stage in (1, 2) else {}
            current = self.reshard(current, Replicate(), stem, user.phase, origin, self.nodes, keep)
        elif current.tensor.is_on_host:
            current = self.move(current, DEVICE, stem, user.phase, origin, self.nodes)
        return current

    def derive_again(self, value: Value, user: Node) -> Value:
        """Repeat, in the backward, the cheap ops that made `value` from gathered parameters."""
        node = self.source.producers[value.name]
        env = {v.name: self.needed(v, user) for v in node.operands}
        again = [replace(self.forward_value(r), name=self.builder.fresh(f"{r.name}_again")) for r in node.results]
        origin = self.builder.origin(node.origin)
        args = tuple(map_values(a, env) for a in node.args)
        self.nodes.append(replace(node, args=args, results=tuple(again), phase=user.phase, origin=origin))
        made = dict(zip((r.name for r in node.results), again, strict=True))
        self.env[user.phase].update(made)
        return made[value.name]

    def forward_value(self, value: Value) -> Value:
        return self.env[Phase.forward][value.name]

    # --- buffers -----------------------------------------------------------------------------------------------

    def is_buffer(self, output: Output) -> bool:
        """Whether an output is a buffer's new value, already placed."""
        known = output.kind is OutputKind.mutation and self.inputs[output.target].kind is InputKind.buffer
        return known and output.value is not None and output.value.name in self.shared

    def share_buffers(self, node: Node, outputs: list[Output]) -> None:
        """A buffer's new value, made by `node` from each rank's own part of the batch, is the first rank's for all."""
        for name, index in ((r.name, index) for r in node.results for index in self.mutations.get(r.name, ())):
            output, value = self.source.outputs[index], self.env[node.phase][name]
            entry = self.inputs[output.target]
            if entry.kind is InputKind.buffer and value.tensor.varies:
                stem, phase, origin = value.name, node.phase, node.origin
                value = self.emit("pending", value, f"{stem}_pending", phase, origin, reduce="root")
                value = self.reshard(value, Replicate(), f"{stem}_root", phase, origin, self.nodes, {})
                outputs[index] = replace(output, value=value)
                self.shared.add(value.name)

    # --- gradients ---------------------------------------------------------------------------------------------

    def reduce_all(self, indices: list[int], outputs: list[Output]) -> None:
        """Put the chains of these gradients here, and forget the indices."""
        for index in indices:
            outputs[index] = self.reduce(outputs[index])
        indices.clear()

    def reduce(self, output: Output) -> Output:
        """The chain from a raw gradient to the gradient at rest."""
        assert output.value is not None
        raw, entry = output.value, self.inputs[output.target]
        producer = self.source.producers.get(raw.name)
        origin = producer.origin if producer else Origin()
        value = self.needed(raw, Node("", (), (), phase=Phase.backward, origin=origin))
        stage, target, rest = entry.stage or 0, entry.target, entry.master or entry.value.tensor.dtype
        if not self.sharded:
            if value.tensor.dtype is not rest:
                value = self.emit("cast", value, f"{raw.name}_cast", Phase.backward, origin, dtype=rest)
            elif self.shares(raw, producer) and not entry.offload:
                value = self.emit("copy", value, f"{raw.name}_own", Phase.backward, origin)
            if entry.offload:
                value = self.move(value, HOST, f"{raw.name}_host", Phase.backward, origin, self.nodes)
            return replace(output, value=value)
        if not value.tensor.varies:
            value = self.as_varying(value, origin)
        wanted = self.context.reduce_dtype or value.tensor.dtype
        if value.tensor.dtype is not wanted:
            value = self.emit("cast", value, f"{raw.name}_cast", Phase.backward, origin, dtype=wanted)
        value = self.emit("pending", value, f"{raw.name}_pending", Phase.backward, origin, reduce="mean")
        phase, into = (Phase.update, self.late) if stage == 1 else (Phase.backward, self.nodes)
        if stage < 2:
            value = self.emit("accumulate", value, f"{raw.name}_sum", phase, origin, into=into, target=target)
        placement = Shard(0) if stage > 0 else Replicate()
        value = self.reshard(value, placement, f"{raw.name}_mean", phase, origin, into, {})
        if value.tensor.dtype is not rest:
            value = self.emit("cast", value, f"{raw.name}_rest", phase, origin, into=into, dtype=rest)
        if entry.offload:
            value = self.move(value, HOST, f"{raw.name}_host", phase, origin, into)
        return replace(output, value=value, phase=phase)

    def as_varying(self, value: Value, origin: Origin) -> Value:
        """A gradient that does not depend on the batch, as each rank's own like any other."""
        result = self.builder.value(f"{value.name}_own", self.at(value.tensor.contiguous(), Varying()))
        self.nodes.append(self.builder.typed("copy", (value,), (result,), Phase.backward, origin))
        return result

    def shares(self, raw: Value, producer: Node | None) -> bool:
        """Whether the gradient may share memory with something else."""
        uses = sum(o.value is not None and o.value.name == raw.name for o in self.source.outputs)
        made_here = producer is not None and producer.phase is Phase.backward
        return not made_here or uses > 1 or bool(producer and views(self.source, producer) and not self.is_whole(raw))

    def is_whole(self, view: Value) -> bool:
        """Whether a view has all of the memory that the backward made for one value, and no other output shares it."""
        roots = self.memory.roots(view.name)
        (root,) = roots if len(roots) == 1 else ("",)
        maker = self.source.producers.get(root)
        if maker is None or maker.phase is not Phase.backward:
            return False
        made = next(r.tensor for r in maker.results if r.name == root)
        is_all = (made.numel, made.dtype, view.tensor.strides) == (view.tensor.numel, view.tensor.dtype, None)
        return is_all and self.returned[root] == 1

    # --- making nodes ------------------------------------------------------------------------------------------

    def emit(
        self,
        op: str,
        value: Value,
        stem: str,
        phase: Phase,
        origin: Origin,
        into: list[Node] | None = None,
        **options: Arg,
    ) -> Value:
        node = self.builder.node(op, (value,), stem, phase, origin, **options)
        (self.nodes if into is None else into).append(node)
        return node.results[0]

    def reshard(
        self,
        value: Value,
        placement: Placement,
        stem: str,
        phase: Phase,
        origin: Origin,
        into: list[Node],
        options: dict[str, Arg],
    ) -> Value:
        result = self.builder.value(stem, self.at(value.tensor.contiguous(), placement).on(DEVICE))
        into.append(self.builder.typed("reshard", (value,), (result,), phase, origin, **options))
        return result

    def move(self, value: Value, space: str, stem: str, phase: Phase, origin: Origin, into: list[Node]) -> Value:
        """The value in another memory space."""
        if any(stride == 0 for stride in value.tensor.strides or ()):
            value = self.emit("copy", value, f"{stem}_dense", phase, origin, into=into)  # elements that share memory
        result = self.builder.value(stem, value.tensor.on(space))
        into.append(self.builder.typed("reshard", (value,), (result,), phase, origin))
        return result

    def relabel(self, output: Output) -> Output:
        """An output of the captured graph as the value that it has become."""
        if output.value is None:
            return output
        name = output.value.name
        if output.phase is Phase.forward:
            known = self.env[Phase.forward].get(name)
            return replace(output, value=known or self.inputs[name].value)
        return replace(output, value=self.needed(output.value, Node("", (), (), phase=Phase.backward)))
