"""Fuse what lies between matmuls into kernels over rows, in the forward and in the backward.

    fwd %a: bf16[8, 64] = aten.silu.default(%gate)
    fwd %y: bf16[8, 64] = aten.mul.Tensor(%a, %up)
                    |
                    v
    fwd %y: bf16[8, 64] = zgraph.rows.default([%gate, %up], "silu_mul 64: x0 bf16[M,N], x1 bf16[M,N] -> ...")

A group grows along the program: an op joins the groups that it reads from, as long as nothing else has read from them.
So a kernel can run where its last op stood. What the backward reads of the forward is made again inside its kernels
where that reads no more: of a norm the input and one number a row stay, not the normalized rows.

What a dropout keeps is a function of a seed and of positions, drawn again where it is needed: its mask is never kept,
and is another than torch's own. Numbers inside a kernel are fp32, so that casts between its ops round no more.
`patterns.py` says what can be fused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from zgraph.codegen.ops import OPS, Extent
from zgraph.codegen.spec import Arg, KernelSpec, Operand, Step
from zgraph.errors import KernelError
from zgraph.ir import Arg as IrArg
from zgraph.ir import Builder, DType, Foreign, Graph, Node, Phase, TensorType, Value
from zgraph.passes.absent import absent_tangents
from zgraph.passes.analysis.order import reorder
from zgraph.passes.base import Context, Numerics, Pass
from zgraph.passes.dce import DeadCode
from zgraph.passes.fused_loss import fused_losses
from zgraph.passes.patterns import PATTERNS, RENAMES, Pattern

DROPOUT = "aten.native_dropout.default"
SEED = "zgraph.seed.default"

ROWS = "zgraph.rows.default"
"""The op that runs a kernel over rows: what it reads, and the kernel's text."""

FLOATS = frozenset({DType.f32, DType.bf16, DType.f16})

MIN_COLUMNS = 8
"""Shorter rows are no rows of a model."""

MAX_WHOLE_COLUMNS = 8192
"""Longer rows do not fit the registers of one program."""

MAX_WORDS = 4
"""Ops that a kernel is named after."""

_TAKES_OPTIONS = frozenset({"aten._to_copy.default", "aten.clone.default"})
"""Ops whose keyword arguments say nothing that the types do not."""


@dataclass(frozen=True)
class Fuse(Pass):
    """Fuse what lies between matmuls into kernels over rows, in the forward and in the backward."""

    name: ClassVar[str] = "fuse"
    numerics: ClassVar[Numerics] = Numerics.reassociates
    conflicts: ClassVar[frozenset[str]] = frozenset({"placed"})

    def run(self, graph: Graph, context: Context) -> Graph:
        graph = fused_losses(graph, self.name)
        groups = _Groups(graph)
        found = groups.found()
        while True:
            needed = groups.needed(found)
            kernels = [(group, _Kernel(groups, group, needed).node()) for group in found]
            done = [
                (group, kernel) for group, kernel in kernels if kernel is not None and groups.has_seeds(group, found)
            ]
            if len(done) == len(found):
                break
            found = [group for group, _ in done]
        return DeadCode().run(_replaced(groups.graph, done) if done else graph, context)


@dataclass(frozen=True)
class Space:
    """The rows that a kernel works on: a tensor of this many elements whose rows have so many columns."""

    numel: object
    columns: int

    def extent(self, value: Value) -> Extent | None:
        """What a value has a number for; None if it is none of a kernel's."""
        kind = value.type
        if not isinstance(kind, TensorType) or kind.strides is not None or kind.is_sharded:
            return None
        if kind.dtype not in FLOATS and kind.dtype is not DType.bool:
            return None
        last = kind.shape[-1] if kind.shape else 1
        if kind.numel == self.numel and last == self.columns:
            return Extent.full
        if last == 1 and kind.numel * self.columns == self.numel and kind.shape:
            return Extent.column
        if last == self.columns and kind.numel == self.columns:
            return Extent.row
        return Extent.scalar if kind.numel == 1 and not kind.shape else None


@dataclass(eq=False)
class Group:
    """Nodes that become one kernel, in their order; `again` are nodes of the forward that it runs again."""

    space: Space
    nodes: list[Node] = field(default_factory=list)
    again: list[Node] = field(default_factory=list)
    is_open: bool = True

    @property
    def makes(self) -> set[str]:
        return {r.name for node in self.nodes for r in node.results}


class _Views:
    """Values as kernels see them: looked at through views that leave rows as they are."""

    def __init__(self, graph: Graph) -> None:
        self.same: dict[str, Value] = {}
        self.base: dict[str, str] = {}
        for node in graph.nodes:
            if node.op not in RENAMES:
                continue
            source, result = node.operands[0], node.results[0]
            self.base[result.name] = self.base.get(source.name, source.name)
            if _same_rows(source, result):
                self.same[result.name] = self.root(source)

    def root(self, value: Value) -> Value:
        """The value itself, whatever shape it is seen in."""
        return self.same.get(value.name, value)


def _same_rows(source: Value, result: Value) -> bool:
    """Whether a view has the same rows, one after the other, or one number of each row for all of its columns."""
    a, b = source.type, result.type
    if not isinstance(a, TensorType) or not isinstance(b, TensorType) or a.strides is not None or not a.shape:
        return False
    if a.shape[-1] == 1 and a.shape[:-1] == b.shape[:-1]:
        return True
    return b.strides is None and a.shape[-1:] == b.shape[-1:] and a.numel == b.numel


def early(graph: Graph) -> Graph:
    """The graph with what can be fused right behind what it reads."""
    priority: dict[int, float] = {}
    made_at: dict[str, float] = {}
    for position, node in enumerate(graph.nodes):
        at = float(position)
        if (node.op in PATTERNS or node.op in RENAMES) and node.operands:
            at = max(made_at.get(v.name, -1.0) for v in node.operands)
        priority[position] = at
        made_at.update((r.name, at) for r in node.results)
    return reorder(graph, lambda position, _: priority[position])


class _Groups:
    """Grows groups along the program."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph = early(graph)
        self.views = _Views(graph)
        self.builder = Builder(graph, Fuse.name)
        self.position = {id(node): position for position, node in enumerate(graph.nodes)}
        self.seeds: dict[str, Value] = {}
        self.absent = absent_tangents(graph)
        self.owner: dict[str, Group] = {}
        self.readers: dict[str, Group] = {}
        self.groups: list[Group] = []

    def found(self) -> list[Group]:
        """The groups worth a kernel, in the order of the program."""
        phase = Phase.forward
        for node in self.graph.nodes:
            if node.phase is not phase:
                self.close(self.groups)
                phase = node.phase
            self.visit(node)
        for group in self.groups:
            self.run_again(group)
        return [g for g in self.groups if len(g.nodes) + len(g.again) > 1 or g.nodes[0].op == DROPOUT]

    def visit(self, node: Node) -> None:
        if node.op in RENAMES:
            return
        makers = [self.owner[n] for v in node.operands if (n := self.views.base.get(v.name, v.name)) in self.owner]
        row = self.graph.foreign.get(node.op)
        if row is None or row.writes or row.opaque:
            makers = self.groups
        readers = [self.readers[n] for v in node.operands if (n := self.views.root(v).name) in self.readers]
        joins = [g for g in dict.fromkeys((*makers, *readers)) if self.may_join(node, g)]
        joins = [g for g in joins if g.space == joins[0].space]
        self.close(g for g in makers if g not in joins)
        if joins:
            self.add(node, self.merged(joins))
        elif (space := self.space(node)) is not None and match(node, self.views, space) is not None:
            self.groups.append(Group(space))
            self.add(node, self.groups[-1])

    def space(self, node: Node) -> Space | None:
        """The rows that a node alone works on."""
        if any(v.name in self.absent for v in node.operands):
            return None
        kinds = [v.type for v in (*node.operands, *node.results) if isinstance(v.type, TensorType)]
        rows = [(k, n) for k in kinds if len(k.shape) > 1 and isinstance(n := k.shape[-1], int) and n >= MIN_COLUMNS]
        if not rows:
            return None
        kind, columns = max(rows, key=lambda row: len(row[0].shape))
        return Space(kind.numel, columns)

    def may_join(self, node: Node, group: Group) -> bool:
        if not group.is_open or node.checkpoint != group.nodes[0].checkpoint:
            return False
        if any(v.name in self.absent for v in node.operands):
            return False
        made = group.makes
        inside = [self.views.base.get(v.name, v.name) in made for v in node.operands]
        seen = [self.views.root(v).name in made for v in node.operands]
        if inside != seen or any(self.views.root(v).name in _row_sums(group, self.views) for v in node.operands):
            return False
        return match(node, self.views, group.space) is not None

    def merged(self, groups: Sequence[Group]) -> Group:
        """One group of several."""
        first, *others = groups
        for other in others:
            first.nodes.extend(other.nodes)
            self.groups.remove(other)
            self.owner.update(dict.fromkeys(other.makes, first))
            self.readers.update((name, first) for name, group in self.readers.items() if group is other)
        if others:
            first.nodes.sort(key=lambda n: self.position[id(n)])
        return first

    def add(self, node: Node, group: Group) -> None:
        group.nodes.append(node)
        self.owner.update((r.name, group) for r in node.results)
        roots = map(self.views.root, node.operands)
        self.readers.update((v.name, group) for v in roots if group.space.extent(v) is Extent.full)

    def close(self, groups: Iterable[Group]) -> None:
        for group in groups:
            group.is_open = False

    # --- the forward inside kernels of the backward ---------------------------------------------------------------

    def run_again(self, group: Group) -> None:
        """Make values of the forward again inside a kernel of the backward, where that reads fewer bytes."""
        if group.nodes[0].phase is Phase.forward:
            return
        while True:
            inputs = self.inputs(group)
            cheaper = [v for v in inputs.values() if self.cost(v, group, inputs, frozenset((v.name,)))[1]]
            if not cheaper:
                return
            wanted = self.cost(cheaper[0], group, inputs, frozenset((cheaper[0].name,)))[1]
            known = {n.name for n in group.again}
            group.again.extend(n for n in wanted if n.name not in known)
            group.again.sort(key=lambda n: self.position[id(n)])

    def needed(self, groups: Sequence[Group]) -> set[str]:
        """Values that something other than the kernel that makes them reads."""
        fused = {id(node) for group in groups for node in group.nodes}
        found = set(self.graph.output_names)
        for group in groups:
            found.update(self.inputs(group))
        for node in self.graph.nodes:
            if id(node) not in fused and not (node.op in RENAMES and node.name in self.views.same):
                found.update(self.views.root(v).name for v in node.operands)
        found.update(self.views.same[name].name for name in self.graph.output_names if name in self.views.same)
        return found

    def has_seeds(self, group: Group, groups: Sequence[Group]) -> bool:
        """Whether all dropouts that a kernel runs again are fused."""
        dropouts = {id(node) for node in group.again if node.op == DROPOUT}
        return dropouts <= {id(node) for other in groups for node in other.nodes} if dropouts else True

    def seed(self, node: Node) -> Value:
        """What a dropout's seed is called."""
        if node.name not in self.seeds:
            self.seeds[node.name] = self.builder.value(f"{node.name}_seed", TensorType(DType.i64, ()))
        return self.seeds[node.name]

    def inputs(self, group: Group) -> dict[str, Value]:
        """What a kernel reads from memory, without seeds."""
        read: dict[str, Value] = {}
        for node in reversed(group.nodes):
            read.update((v.name, v) for v in map(self.views.root, node.operands))
        for node in reversed(group.again):
            read.update((v.name, v) for v in self.reads(node, group.space, read))
        made = {r.name for node in (*group.again, *group.nodes) for r in node.results}
        return {name: v for name, v in read.items() if name not in made}

    def reads(self, node: Node, space: Space, wanted: Collection[str]) -> list[Value]:
        """What those results of a node that are wanted are made of."""
        found = match(node, self.views, space)
        assert found is not None, "it was matched before"
        used = {a for step in found.making(node, wanted) for a in step.args}
        bound = (thing for name, thing in found.bound.items() if name in used)
        return [self.views.root(thing) for thing in bound if isinstance(thing, Value)]

    def cost(
        self, value: Value, group: Group, inputs: Mapping[str, Value], trying: frozenset[str] = frozenset()
    ) -> tuple[int, list[Node]]:
        """The fewest bytes to read for a value, and the nodes of the forward to run again for that.

        Args:
            value: what is wanted.
            group: whose kernel wants it.
            inputs: what the kernel reads anyhow.
            trying: values that are not there for nothing although they are among the inputs.
        """
        extent = group.space.extent(value)
        if extent is not Extent.full or (value.name in inputs and value.name not in trying):
            return 0, []
        kept = value.tensor.dtype.itemsize
        maker = self.graph.producers.get(value.name)
        if maker is None or maker.phase is not Phase.forward or maker.op in RENAMES or len(trying) > MAX_DEPTH:
            return kept, []
        found = match(maker, self.views, group.space)
        if found is None or any(OPS[s.op].reduces for s in found.making(maker, (value.name,))):
            return kept, []
        total, nodes = 0, list[Node]()
        for operand in self.reads(maker, group.space, (value.name,)):
            num_bytes, again = self.cost(operand, group, inputs, trying | {value.name})
            total += num_bytes
            nodes.extend(n for n in again if n not in nodes)
        return (total, [*nodes, maker]) if total < kept else (kept, [])


MAX_DEPTH = 12
"""How many ops of the forward a kernel of the backward looks back over."""


def _row_sums(group: Group, views: _Views) -> set[str]:
    """Sums over all rows: known only when the whole kernel is over."""
    found = set[str]()
    for node in group.nodes:
        if (matched := match(node, views, group.space)) is not None:
            names = zip(matched.pattern.results, node.results, strict=True)
            sums = {s.name for s in matched.pattern.steps if OPS[s.op].reduces == "rows"}
            found.update(result.name for name, result in names if name in sums)
    return found


@dataclass(frozen=True)
class Match:
    """A pattern, with the value or number that each of its names stands for."""

    pattern: Pattern
    bound: Mapping[str, Value | float]

    def making(self, node: Node, wanted: Collection[str]) -> list[Step]:
        """The steps that make those results of the node that are wanted."""
        names = zip(self.pattern.results, node.results, strict=True)
        return self.pattern.making([name for name, result in names if result.name in wanted])


def match(node: Node, views: _Views, space: Space) -> Match | None:
    """The pattern that a node is of, if all that it reads and makes lies in these rows."""
    if node.kwargs and node.op not in _TAKES_OPTIONS:
        return None
    for pattern in PATTERNS.get(node.op, ()):
        if space.columns > MAX_WHOLE_COLUMNS and pattern.needs_whole_rows:
            continue
        bound = _bind(pattern, node)
        if bound is None or len(pattern.results) != len(node.results):
            continue
        if any(space.extent(views.root(v)) is None for v in bound.values() if isinstance(v, Value)):
            continue
        if all(space.extent(r) is not None for r in node.results):
            return Match(pattern, bound)
    return None


def _bind(pattern: Pattern, node: Node) -> dict[str, Value | float] | None:
    rank = next((len(v.type.shape) for v in node.operands if isinstance(v.type, TensorType)), 0)
    bound: dict[str, Value | float] = {}
    if len(node.args) > len(pattern.args):
        return None
    for position, wanted in enumerate(pattern.args):
        arg = node.args[position] if position < len(node.args) else None
        if not _NAME.fullmatch(wanted) or wanted in _WORDS:
            if wanted != "_" and wanted != (_dims(arg, rank) if wanted in _DIMS else _written(arg)):
                return None
        elif isinstance(arg, Value) or (isinstance(arg, int | float) and not isinstance(arg, bool)):
            bound[wanted] = arg if isinstance(arg, Value) else float(arg)
        else:
            return None
    return bound


_NAME = re.compile(r"[a-z]\w*")
_DIMS = ("last", "rows")
_WORDS = frozenset({"none", "true", "false", *_DIMS})


def _dims(arg: IrArg, rank: int) -> str:
    """Dimensions as patterns write them; nothing for others."""
    dims = [d for d in (arg if isinstance(arg, tuple) else (arg,)) if isinstance(d, int)]
    around = sorted(d % rank for d in dims) if rank else []
    return "last" if around == [rank - 1] else "rows" if around == list(range(rank - 1)) else ""


def _written(arg: IrArg) -> str:
    """An argument as patterns write it."""
    if isinstance(arg, tuple):
        return "[" + ",".join(map(_written, arg)) + "]"
    if isinstance(arg, int | float) and not isinstance(arg, bool):
        return f"{arg:g}"
    return str(arg).lower()


@dataclass(frozen=True)
class Fused:
    """The nodes of a kernel: the seeds that it needs, the call, and views that give its results the shapes wanted."""

    nodes: tuple[Node, ...]


class _Kernel:
    """A group as a node of the graph."""

    def __init__(self, groups: _Groups, group: Group, needed: set[str]) -> None:
        self.group, self.needed, self.views, self.builder = group, needed, groups.views, groups.builder
        self.inputs: list[Value] = []
        self.groups = groups
        self.seeds: list[Value] = []
        self.names: dict[str, Arg] = {}
        self.steps: list[Step] = []
        self.made: dict[tuple[str, tuple[Arg, ...]], str] = {}

    def node(self) -> Fused | None:
        """What stands in the group's place; None where a kernel would not do."""
        group, space, inputs = self.group, self.group.space, self.inputs
        read = {self.views.root(v).name for node in (*group.again, *group.nodes) for v in node.operands}
        for node in group.again:
            self._add(node, read)
        for node in group.nodes:
            self._add(node, self.needed | read)
        wanted = [r for node in group.nodes for r in node.results if r.name in self.needed]
        outputs = list(self._outputs(wanted))
        operands = tuple(Operand(str(self.names[v.name]), v.tensor.dtype, self._extent(v)) for v in inputs)
        try:
            spec = KernelSpec(self._stem(), space.columns, operands, tuple(outputs), tuple(self.steps))
        except KernelError:
            return None  # a value that is wanted does not depend on all that its shape says
        shaped = next((v for v in inputs if self._extent(v) is Extent.full), None)
        if shaped is None:
            return None
        return self._called(spec, inputs, wanted, shaped)

    def _called(
        self, spec: KernelSpec, inputs: Sequence[Value], wanted: Sequence[Value], shaped: Value
    ) -> Fused | None:
        last = self.group.nodes[-1]
        named = next((n.origin for n in reversed(self.group.nodes) if n.origin.module), last.origin)
        origin = self.builder.origin(named)
        results: list[Value] = []
        views: list[Node] = []
        for value in wanted:
            extent = self._extent(value)
            shape = {
                Extent.full: shaped.tensor.shape, Extent.column: (*shaped.tensor.shape[:-1], 1),
                Extent.row: (spec.columns,), Extent.scalar: (),
            }[extent]  # fmt: skip
            if value.tensor.shape == shape:
                results.append(value)
                continue
            if not all(isinstance(d, int) for d in value.tensor.shape):
                return None
            results.append(self.builder.value(f"{value.name}_rows", replace(value.tensor, shape=shape)))
            sizes = tuple(d for d in value.tensor.shape if isinstance(d, int))
            views.append(
                Node("aten.view.default", (results[-1], sizes), (value,), (), last.phase, origin, last.checkpoint)
            )
        arguments: tuple[IrArg, ...] = (tuple(inputs), str(spec))
        call = Node(ROWS, arguments, tuple(results), (), last.phase, origin, last.checkpoint)
        seeds = [Node(SEED, (shaped,), (seed,), (), last.phase, origin) for seed in self.seeds]
        return Fused((*seeds, call, *views))

    def _add(self, node: Node, wanted: Collection[str]) -> None:
        """The steps that make what is wanted of a node."""
        found = match(node, self.views, self.group.space)
        assert found is not None, "it joined the group"
        steps = found.making(node, wanted)
        used = {a for step in steps for a in step.args}
        names: dict[str, Arg] = {"per_column": 1 / self.group.space.columns}
        if "seed" in used:
            names["seed"] = self._seed(node)
        if isinstance(p := found.bound.get("p"), float) and p < 1:
            names["per_kept"] = 1 / (1 - p)
        for name, thing in found.bound.items():
            if name in used:
                names[name] = self._named(thing) if isinstance(thing, Value) else thing
        for step in steps:
            args = tuple(names[a] if isinstance(a, str) else a for a in step.args)
            names[step.name] = args[0] if step.op == "copy" else self._step(step.op, args)
        for name, result in zip(found.pattern.results, node.results, strict=True):
            if name in names:
                self.names[result.name] = names[name]

    def _seed(self, node: Node) -> Arg:
        """The seed of a dropout: drawn before the kernel of the forward."""
        seed = self.groups.seed(node)
        if node.phase is self.group.nodes[0].phase:
            self.seeds.append(seed)
        return self._named(seed)

    def _named(self, value: Value) -> Arg:
        """What a step calls a value: what another step made, or the next input."""
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
        """What the kernel writes; an input or what is written twice, as a copy of its own."""
        taken = {name for name in self.names.values() if isinstance(name, str) and name.startswith("x")}
        for value in wanted:
            name = self.names[value.name]
            if name in taken:
                name = f"v{len(self.steps)}"
                self.steps.append(Step(name, "copy", (self.names[value.name],)))
            assert isinstance(name, str)
            taken.add(name)
            yield Operand(name, value.tensor.dtype, self._extent(value))

    def _extent(self, value: Value) -> Extent:
        if value in self.groups.seeds.values():
            return Extent.scalar
        extent = self.group.space.extent(value)
        assert extent is not None, "it joined the group"
        return extent

    def _stem(self) -> str:
        """A name from what the ops are called."""
        words = (node.op.split(".")[1].removeprefix("native").strip("_") for node in self.group.nodes)
        return "_".join([w for w in dict.fromkeys(words) if w not in ("to_copy", "clone")][:MAX_WORDS]) or "cast"


def _replaced(graph: Graph, kernels: Sequence[tuple[Group, Fused]]) -> Graph:
    """The graph with each kernel where its last op stood, and behind it the views of what it makes."""
    inside = {id(node): number for number, (group, _) in enumerate(kernels) for node in group.nodes}
    last = {id(group.nodes[-1]): number for number, (group, _) in enumerate(kernels)}
    waiting: dict[str, int] = {}
    delayed: dict[int, list[Node]] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        number = inside.get(id(node))
        if number is not None:
            waiting.update((r.name, number) for r in node.results)
            if last.get(id(node)) == number:
                made = {r.name for n in kernels[number][1].nodes for r in n.results}
                nodes += kernels[number][1].nodes
                for view in delayed.pop(number, ()):
                    if all(v.name in made or v.name not in waiting for v in view.operands):
                        nodes.append(view)
                        made.update(r.name for r in view.results)
                for name in [n for n, at in waiting.items() if at == number]:
                    del waiting[name]
            continue
        held = [waiting[v.name] for v in node.operands if v.name in waiting]
        if held:
            assert node.op in RENAMES, "a group is closed by what reads from it"
            delayed.setdefault(held[0], []).append(node)
            waiting.update((r.name, held[0]) for r in node.results)
            continue
        nodes.append(node)
    foreign = {
        **graph.foreign,
        ROWS: Foreign(multi=True),
        SEED: Foreign(random=True),
        "aten.view.default": Foreign(views=(0,)),
    }
    return replace(graph, nodes=tuple(nodes), foreign=foreign)
