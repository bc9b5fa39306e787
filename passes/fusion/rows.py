"""A group of nodes as one kernel over rows: its specification, and the node that calls it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from zgraph.codegen.ops import Extent
from zgraph.codegen.spec import ACC, Arg, KernelSpec, Operand, Step
from zgraph.errors import KernelError
from zgraph.ir import Arg as IrArg
from zgraph.ir import Builder, DType, ExternalOp, Node, TensorType, Value
from zgraph.ir.external_ops import COMPILED, DROPOUT, MATMUL, RECTIFIED, ROWS, SEED, VIEW
from zgraph.passes.analysis.rows import Space, Views, match

FOREIGN = {
    ROWS: ExternalOp(multi=True),
    COMPILED: ExternalOp(multi=True),
    MATMUL: ExternalOp(multi=True),
    SEED: ExternalOp(random=True),
    RECTIFIED: ExternalOp(),
    VIEW: ExternalOp(views=(0,)),
}
"""Properties of the ops that replace groups."""

MAX_WORDS = 4
"""Ops that a kernel is named after."""


@dataclass(eq=False)
class Group:
    """Nodes that become one kernel, in their order; `again` are nodes of the forward that it runs again.

    `sums` are its sums over all rows, which are known only when it is over. Where there is a `matmul`, the others are
    its epilogue. A `call` stands in its place instead of a kernel, and `op` runs that.
    """

    space: Space
    nodes: list[Node] = field(default_factory=list)
    again: list[Node] = field(default_factory=list)
    sums: set[str] = field(default_factory=set)
    matmul: Node | None = None
    call: tuple[Node, ...] | None = None
    op: str = ROWS
    is_open: bool = True

    @property
    def members(self) -> list[Node]:
        """The nodes that the kernel replaces, in order."""
        return [*([self.matmul] if self.matmul else []), *self.nodes]


class Seeds:
    """The seeds of dropouts: one for each, whatever kernels draw from it."""

    def __init__(self, builder: Builder) -> None:
        self._builder = builder
        self._of: dict[str, Value] = {}

    def of(self, dropout: Node) -> Value:
        """The seed of a dropout; a new value the first time."""
        if dropout.name not in self._of:
            self._of[dropout.name] = self._builder.value(f"{dropout.name}_seed", TensorType(DType.i64, ()))
        return self._of[dropout.name]

    def __contains__(self, value: Value) -> bool:
        return value in self._of.values()


class Kernel:
    """A group as a node of the graph."""

    def __init__(self, group: Group, views: Views, drawn: Seeds, builder: Builder, needed: Collection[str]) -> None:
        self.group, self.views, self.drawn, self.builder, self.needed = group, views, drawn, builder, needed
        self.inputs: list[Value] = []
        self.seeds: list[Value] = []
        self.names: dict[str, Arg] = {}
        self.steps: list[Step] = []
        self.made: dict[tuple[str, tuple[Arg, ...]], str] = {}

    def nodes(self) -> tuple[Node, ...] | None:
        """The nodes that replace the group: seeds, the call, and views that give its results the shapes wanted.

        Seeds are drawn of all dropouts, also of one whose results a kernel of the backward alone makes. None where a
        kernel would not do.
        """
        group, space, inputs = self.group, self.group.space, self.inputs
        read = {self.views.root(v).name for node in (*group.again, *group.nodes) for v in node.operands}
        self.seeds = [self.drawn.of(node) for node in group.nodes if node.op == DROPOUT]
        if group.matmul is not None:
            self._multiply(group.matmul)
        for node in group.again:
            self._add(node, read)
        for node in group.nodes:
            self._add(node, [r.name for r in node.results if r.name in read or r.name in self.needed])
        wanted = [r for node in group.members for r in node.results if r.name in self.needed]
        outputs = list(self._outputs(wanted))
        operands = [Operand(ACC, DType.f32, Extent.full)] if group.matmul is not None else []
        operands += [Operand(str(self.names[v.name]), v.tensor.dtype, self._extent(v)) for v in inputs]
        try:
            spec = KernelSpec(self._stem(), space.columns, tuple(operands), tuple(outputs), tuple(self.steps))
        except KernelError:
            return None  # a value that is wanted does not depend on all that its shape says
        if group.matmul is not None:
            return None if spec.needs_whole_rows else self._called(spec, inputs, wanted, group.matmul.results[0])
        shaped = next((v for v in inputs if self._extent(v) is Extent.full), None)
        if shaped is None:
            return None
        return self._called(spec, inputs, wanted, shaped)

    def _called(
        self, spec: KernelSpec, inputs: Sequence[Value], wanted: Sequence[Value], shaped: Value
    ) -> tuple[Node, ...] | None:
        last = self.group.nodes[-1]
        named = next((n.origin for n in reversed(self.group.nodes) if n.origin.module), last.origin)
        origin = self.builder.origin(named)
        results: list[Value] = []
        views: list[Node] = []
        for value in wanted:
            shape = self._extent(value).shape(shaped.tensor.shape[:-1], spec.columns)
            if value.tensor.shape == shape:
                results.append(value)
                continue
            if not all(isinstance(d, int) for d in value.tensor.shape):
                return None
            results.append(self.builder.value(f"{value.name}_rows", replace(value.tensor, shape=shape)))
            sizes = tuple(d for d in value.tensor.shape if isinstance(d, int))
            views.append(Node(VIEW, (results[-1], sizes), (value,), (), last.phase, origin, last.checkpoint))
        matmul = self.group.matmul
        matrices = matmul.operands[-2:] if matmul is not None else ()
        arguments: tuple[IrArg, ...] = (*matrices, tuple(inputs), str(spec))
        op = self.group.op if matmul is None else MATMUL
        call = Node(op, arguments, tuple(results), (), last.phase, origin, last.checkpoint)
        like = (*matrices, shaped)[0]
        seeds = [Node(SEED, (like,), (seed,), (), last.phase, origin) for seed in self.seeds]
        return *seeds, call, *views

    def _multiply(self, matmul: Node) -> None:
        """The product, with the bias of one that has it."""
        (result,), (*bias, _, _) = matmul.results, matmul.operands
        self.names[result.name] = self._step("add", (ACC, self._named(bias[0]))) if bias else ACC

    def _add(self, node: Node, wanted: Collection[str]) -> None:
        """The steps that make what is wanted of a node."""
        found = match(node, self.views, self.group.space)
        assert found is not None, "it joined the group"
        steps = found.making(node, wanted)
        used = {a for step in steps for a in step.args}
        names: dict[str, Arg] = {"per_column": 1 / self.group.space.columns}
        if "seed" in used:
            names["seed"] = self._named(self.drawn.of(node))
        if isinstance(p := found.bound.get("p"), float):
            names["per_kept"] = 1 / (1 - p) if p < 1 else 0.0  # nothing is kept
        for name, thing in found.bound.items():
            if name in used:
                names[name] = self._named(thing) if isinstance(thing, Value) else thing
        for step in steps:
            args = tuple(names[a] if isinstance(a, str) else a for a in step.args)
            names[step.name] = args[0] if step.op == "copy" else self._step(step.op, args)
        for name, result in zip(found.pattern.results, node.results, strict=True):
            if name in names:
                self.names[result.name] = names[name]

    def _named(self, value: Value) -> Arg:
        """The argument that stands for a value in a step: a result of an earlier step, or the next input."""
        value = self.views.root(value)
        if value.name not in self.names:
            self.names[value.name] = f"x{len(self.inputs)}"
            self.inputs.append(value)
        return self.names[value.name]

    def _step(self, op: str, args: tuple[Arg, ...]) -> str:
        key = op, args
        if key not in self.made:
            self.made[key] = f"v{len(self.steps)}"
            self.steps.append(Step(self.made[key], op, args))
        return self.made[key]

    def _outputs(self, wanted: Iterable[Value]) -> Iterator[Operand]:
        """The operands that the kernel writes. An input, or a value written twice, is written as a separate copy."""
        taken = {name for name in self.names.values() if isinstance(name, str) and name.startswith(("x", ACC))}
        for value in wanted:
            name = self.names[value.name]
            if name in taken:
                name = f"v{len(self.steps)}"
                self.steps.append(Step(name, "copy", (self.names[value.name],)))
            assert isinstance(name, str)
            taken.add(name)
            yield Operand(name, value.tensor.dtype, self._extent(value))

    def _extent(self, value: Value) -> Extent:
        if value in self.drawn:
            return Extent.scalar
        extent = self.group.space.extent(value)
        assert extent is not None, "it joined the group"
        return extent

    def _stem(self) -> str:
        """A name from what the ops are called."""
        words = (node.op.split(".")[1].removeprefix("native").strip("_") for node in self.group.members)
        return "_".join([w for w in dict.fromkeys(words) if w not in ("to_copy", "clone")][:MAX_WORDS]) or "cast"
