"""Groups of ops that can be one kernel, grown along the program, and what may stand in the place of each."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from zgraph.codegen.ops import SCALAR_OPS, Extent
from zgraph.cost import signature
from zgraph.ir import Builder, Graph, Node, Phase, TensorType, Value
from zgraph.ir.external_ops import COMPILED, DROPOUT, RECTIFIED, ROWS, VIEW, facts
from zgraph.passes.analysis.order import reorder
from zgraph.passes.analysis.rows import Space, Views, match
from zgraph.passes.core.base import Choice
from zgraph.passes.fusion.candidates import Candidate, Candidates
from zgraph.passes.fusion.patterns import PATTERNS
from zgraph.passes.fusion.rows import FOREIGN, Group, Kernel, Seeds
from zgraph.passes.plan.zero_tangents import zero_tangents

MIN_COLUMNS = 8
"""Shorter rows are no rows of a model."""

MAX_DEPTH = 12
"""How many ops of the forward a kernel of the backward looks back over, beside the one that made what it reads."""


def early(graph: Graph) -> Graph:
    """The graph with what can be fused right behind what it reads.

    What the backward computes of values of the forward alone stays where it is: where these are computed again, they
    would all be there from the begin of the backward on.
    """
    priority: dict[int, float] = {}
    made_at: dict[str, float] = {}
    begin = next((at for at, node in enumerate(graph.nodes) if node.phase is Phase.backward), len(graph.nodes))
    for position, node in enumerate(graph.nodes):
        at = float(position)
        if (node.op in PATTERNS or facts(node.op).keeps_rows) and node.operands:
            latest = max(made_at.get(v.name, -1.0) for v in node.operands)
            at = at if node.phase is Phase.backward and latest < begin else latest
        priority[position] = at
        made_at.update((r.name, at) for r in node.results)
    return reorder(graph, lambda position, _: priority[position])


class Groups:
    """Grows groups along the program.

    Args:
        graph: the program.
        made_by: the pass that kernels are marked with.
    """

    def __init__(self, graph: Graph, made_by: str) -> None:
        self.graph = graph = early(graph)
        self.views = Views(graph)
        self.builder, self.trial = Builder(graph, made_by), Builder(graph, made_by)
        self.position = {id(node): position for position, node in enumerate(graph.nodes)}
        self.seeds = Seeds(self.builder)
        self.zero_tangents = zero_tangents(graph)
        self.owner: dict[str, Group] = {}
        self.readers: dict[str, Group] = {}
        self.groups: list[Group] = []

    def found(self) -> list[Group]:
        """All groups, in the order of the program."""
        phase = Phase.forward
        for node in self.graph.nodes:
            if node.phase is not phase:
                self.close(self.groups)
                phase = node.phase
            self.visit(node)
        for group in self.groups:
            self.run_again(group)
        return self.groups

    def candidates(self, matmuls: Choice, hints: Mapping[str, int]) -> Iterator[Candidates]:
        """How each group can be run, the groups in the order of the program."""
        found = self.found()
        graph = replace(self.graph, foreign={**self.graph.foreign, **FOREIGN})
        read = self.read(found, {id(node) for group in found for node in group.nodes})
        taken: set[str] = set()
        for group in found:
            alone = self.tried(group, read)
            if alone is None:
                continue
            matmul = self.matmul(group) if matmuls != "never" else None
            before = (matmul,) if matmul is not None else ()
            nodes: dict[Candidate, tuple[Node, ...]] = {"aten": (*before, *group.nodes)}
            if len(group.nodes) + len(group.again) > 1 or group.nodes[0].op == DROPOUT:
                nodes["kernel"] = (*before, *alone)
                nodes["inductor"] = *before, *(replace(n, op=COMPILED) if n.op == ROWS else n for n in alone)
            if matmul is not None and matmul.name not in taken:
                own = self.inputs(group)
                made = [r.name for node in nodes["aten"] for r in node.results]
                needed = {name for name in made if read[name] > (name in own)}
                joined = self.tried(replace(group, matmul=matmul), needed)
                if joined is not None:
                    taken.add(matmul.name)
                    nodes["matmul"] = joined
                if call := self.library_call(group, matmul, read):
                    nodes["library"] = call
            kernel = next(n for n in alone if n.op == ROWS)
            yield Candidates(group, " ".join(signature(n, hints) for n in (*before, kernel)), matmul, nodes, graph)

    def visit(self, node: Node) -> None:
        if facts(node.op).keeps_rows:
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
        if self.is_absent(node):
            return None
        kinds = [v.type for v in (*node.operands, *node.results) if isinstance(v.type, TensorType)]
        rows = [(k, n) for k in kinds if len(k.shape) > 1 and isinstance(n := k.shape[-1], int) and n >= MIN_COLUMNS]
        if not rows:
            return None
        kind, columns = max(rows, key=lambda row: len(row[0].shape))
        return Space(kind.numel, columns)

    def is_absent(self, node: Node) -> bool:
        """Whether a node reads a tangent that is likely to be zero, and must be left to be taken out."""
        return any(self.views.base.get(v.name, v.name) in self.zero_tangents for v in node.operands)

    def may_join(self, node: Node, group: Group) -> bool:
        if not group.is_open or node.checkpoint != group.nodes[0].checkpoint:
            return False
        if self.is_absent(node):
            return False
        roots = [self.views.root(v).name for v in node.operands]
        inside = [self.owner.get(self.views.base.get(v.name, v.name)) is group for v in node.operands]
        if inside != [self.owner.get(root) is group for root in roots] or not group.sums.isdisjoint(roots):
            return False
        return match(node, self.views, group.space) is not None

    def merged(self, groups: Sequence[Group]) -> Group:
        """One group of several."""
        first, *others = groups
        for other in others:
            first.nodes.extend(other.nodes)
            first.sums |= other.sums
            self.groups.remove(other)
            self.owner.update((r.name, first) for node in other.nodes for r in node.results)
            self.readers.update((name, first) for name, group in self.readers.items() if group is other)
        if others:
            first.nodes.sort(key=lambda n: self.position[id(n)])
        return first

    def add(self, node: Node, group: Group) -> None:
        found = match(node, self.views, group.space)
        assert found is not None, "it was matched before"
        sums = {s.name for s in found.pattern.steps if SCALAR_OPS[s.op].reduces == "rows"}
        names = zip(found.pattern.results, node.results, strict=True)
        group.sums.update(result.name for name, result in names if name in sums)
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
            plans = (self.cost(v, group, inputs, frozenset((v.name,)))[1] for v in inputs.values())
            wanted = next((plan for plan in plans if plan), None)
            if wanted is None:
                return
            known = {n.name for n in group.again}
            group.again.extend(n for n in wanted if n.name not in known)
            group.again.sort(key=lambda n: self.position[id(n)])

    def matmul(self, group: Group) -> Node | None:
        """The last matmul before a group that makes an operand of it, where all else that reads it comes later."""
        first, last = group.nodes[0], self.position[id(group.nodes[-1])]
        inside = {id(node) for node in group.nodes}
        makers = [self.graph.producers.get(name) for name in self.inputs(group)]
        for node in sorted((m for m in makers if m is not None), key=lambda m: -self.position[id(m)]):
            if (
                not facts(node.op).takes_epilogue
                or node.kwargs
                or (node.phase, node.checkpoint) != (first.phase, first.checkpoint)
            ):
                continue
            bias = [group.space.extent(v) for v in node.operands[:-2]]
            others = (n for n in self.readers_of[node.name] if id(n) not in inside)
            fits = group.space.extent(node.results[0]) is Extent.full and None not in bias
            if fits and all(self.position[id(n)] > last for n in others):
                return node
        return None

    def library_call(self, group: Group, matmul: Node, read: Counter[str]) -> tuple[Node, ...]:
        """A bias and a rectifier behind a matmul that nothing else reads: cuBLASLt has an epilogue for them."""
        (product,), (last, *others) = matmul.results, group.nodes
        is_one = not others and not group.again and read[product.name] == 1
        if not is_one or matmul.op != "aten.addmm.default" or last.op != "aten.relu.default":
            return ()
        (made,) = last.results
        whole = Node(RECTIFIED, matmul.args, last.results, (), last.phase, last.origin, last.checkpoint)
        if made.tensor.shape == product.tensor.shape:
            return (whole,)
        sizes = tuple(d for d in made.tensor.shape if isinstance(d, int))
        flat = self.builder.value(f"{made.name}_rows", product.tensor)
        view = replace(whole, op=VIEW, args=(flat, sizes))
        return (replace(whole, results=(flat,)), view) if len(sizes) == len(made.tensor.shape) else ()

    @cached_property
    def readers_of(self) -> Mapping[str, list[Node]]:
        """The nodes that read each value, directly or through views of it."""
        found: dict[str, list[Node]] = defaultdict(list)
        for node in self.graph.nodes:
            if not facts(node.op).keeps_rows:
                for v in node.operands:
                    found[self.views.base.get(v.name, v.name)].append(node)
        return found

    def read(self, groups: Sequence[Group], fused: Collection[int]) -> Counter[str]:
        """How often each value is read by something other than the kernel that makes it.

        Args:
            groups: what become kernels.
            fused: ids of the nodes in them.
        """
        found = Counter(self.graph.output_names)
        for group in groups:
            found.update(self.inputs(group).keys())
        for node in self.graph.nodes:
            if id(node) not in fused and not (facts(node.op).keeps_rows and node.name in self.views.same):
                found.update(self.views.root(v).name for v in node.operands)
        found.update(self.views.same[name].name for name in self.graph.output_names if name in self.views.same)
        return found

    def has_seeds(self, group: Group, fused: Collection[int]) -> bool:
        """Whether all dropouts that a kernel runs again are fused."""
        return all(id(node) in fused for node in group.again if node.op == DROPOUT)

    def kernel(self, group: Group, needed: Collection[str]) -> tuple[Node, ...] | None:
        """A group as a kernel that writes what is needed, and what goes with it; None where a kernel would not do."""
        return Kernel(group, self.views, self.seeds, self.builder, needed).nodes()

    def tried(self, group: Group, needed: Collection[str]) -> tuple[Node, ...] | None:
        """The same with names that are given to others again."""
        return Kernel(group, self.views, self.seeds, self.trial, needed).nodes()

    def inputs(self, group: Group) -> dict[str, Value]:
        """Values that a kernel reads from memory, without seeds. The matrices of its matmul are, although it may make
        one of them again for its epilogue."""
        read: dict[str, Value] = {}
        for node in reversed(group.members):
            read.update((v.name, v) for v in map(self.views.root, node.operands))
        for node in reversed(group.again):
            read.update((v.name, v) for v in self.reads(node, group.space, read))
        made = {r.name for node in (*group.again, *group.members) for r in node.results}
        matrices = {self.views.root(v).name for v in group.matmul.operands[-2:]} if group.matmul else ()
        return {name: v for name, v in read.items() if name not in made or name in matrices}

    def reads(self, node: Node, space: Space, wanted: Collection[str]) -> list[Value]:
        """Operands of a node from which its wanted results are computed."""
        found = match(node, self.views, space)
        assert found is not None, "it was matched before"
        used = {a for step in found.making(node, wanted) for a in step.args}
        bound = (thing for name, thing in found.bound.items() if name in used)
        return [self.views.root(thing) for thing in bound if isinstance(thing, Value)]

    def cost(
        self, value: Value, group: Group, inputs: Mapping[str, Value], trying: frozenset[str]
    ) -> tuple[int, list[Node]]:
        """The fewest bytes to read for a value, and the nodes of the forward to run again for that.

        Args:
            value: what is wanted.
            group: whose kernel wants it.
            inputs: what the kernel reads in any case.
            trying: values that are not there for nothing although they are among the inputs.
        """
        extent = group.space.extent(value)
        if extent is not Extent.full or (value.name in inputs and value.name not in trying):
            return 0, []
        kept = value.tensor.dtype.itemsize
        maker = self.graph.producers.get(value.name)
        if maker is None or maker.phase is not Phase.forward or facts(maker.op).keeps_rows or len(trying) > MAX_DEPTH:
            return kept, []
        found = match(maker, self.views, group.space)
        if found is None or any(SCALAR_OPS[s.op].reduces for s in found.making(maker, (value.name,))):
            return kept, []
        total, nodes = 0, list[Node]()
        for operand in self.reads(maker, group.space, (value.name,)):
            num_bytes, again = self.cost(operand, group, inputs, trying | {value.name})
            total += num_bytes
            nodes.extend(n for n in again if n not in nodes)
        return (total, [*nodes, maker]) if total < kept else (kept, [])
