"""Where values live along one model axis: each node takes the strategy of its rule that moves the fewest bytes.

Parameters are where their users want them. From there cuts spread: `x @ w` with columns of w cut has them cut, and a
product over what is cut makes a partial sum. A partial sum is reduced at once, unless all that reads it is linear in it
and adds it to sums like it, as where the gradients of three projections of one input meet: they are reduced once. This
is Megatron's pattern where the parameters are placed as Megatron places them (Shoeybi et al., 2019). An op along a dim
that is cut is spelled out, where it has a definition (`zgraph.ir.rules.definitions`): a softmax over parts of a
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from zgraph.ir import (
    Builder,
    Graph,
    InputKind,
    Node,
    OutputKind,
    Partial,
    Phase,
    Placement,
    Replicate,
    Shard,
    TensorType,
    Value,
)
from zgraph.ir.axis_rules import SUMMED, collective
from zgraph.ir.ops import views
from zgraph.ir.rules import Call, Rule, Strategy, meant, rule_of
from zgraph.ir.rules.definitions import DEFINED, defined, dim_of, spelled_out
from zgraph.ir.rules.factors import Cut, letters, written
from zgraph.ir.rules.kept import cuts_of
from zgraph.ir.symbols import simplify

R, P = Replicate(), Partial("sum")

Rules = Sequence[Rule | None]
"""The rule of each node."""

PARAMETERS_COUNT = 1000
"""Bytes of parameters count as often as this: they lie where their user wants them."""


@dataclass(frozen=True)
class Choices:
    """A choice for every node.

    Args:
        graph: the graph, in which ops along cut dims are spelled out.
        strategies: by the node's position.
        rules: of each node; None where it has none.
        reduced: values that are partial sums where they are made, and are reduced there, and to which placement.
        views: values that are made where they are read: wherever what they view is.
        ways: how a value comes to a placement, where that was chosen: from another placement of it, or of what it
            views.
        routed: the running counts by which rows find their ranks, by the node that looks rows up or adds them.
        returned: where the model's outputs lie that are not whole, by their name.
        given: where inputs of the backward lie that are not whole, by their name.
    """

    graph: Graph
    strategies: tuple[Strategy, ...]
    rules: tuple[Rule | None, ...]
    reduced: Mapping[str, Placement]
    views: frozenset[str] = frozenset()
    ways: Mapping[tuple[str, Placement], tuple[str, Placement]] = field(default_factory=dict)
    routed: Mapping[str, Value] = field(default_factory=dict)
    returned: Mapping[str, Placement] = field(default_factory=dict)
    given: Mapping[str, Placement] = field(default_factory=dict)

    def any_place(self, name: str) -> Placement:
        """A placement that a view can have, for ops that read its type alone."""
        return next((place for viewed, place in self.ways if viewed == name), R)


def choose(graph: Graph, seeds: Mapping[str, Placement], num_ranks: int, *, sequence: bool = False) -> Choices:
    """A strategy for every node of a graph on whole tensors.

    Args:
        graph: the graph.
        seeds: the placement of inputs, by name; all others are whole.
        num_ranks: ranks along the axis.
        sequence: whether what is reduced lies cut along the sequence afterwards, where its reader takes it so.
    """
    tokens: Mapping[str, Placement] | None = None

    def walked(graph: Graph, rules: Rules, kept: frozenset[str], sums: frozenset[str]) -> Walk:
        nonlocal tokens
        if sequence and tokens is None:
            tokens = along_sequence(graph, rules, num_ranks)
        return Walk(graph, seeds, num_ranks, rules, kept, tokens, sums)

    def plain(graph: Graph, rules: Rules) -> Walk:
        return Walk(graph, seeds, num_ranks, rules, frozenset())

    return chosen(views_once(graph) if sequence else graph, plain, walked)


def chosen(
    graph: Graph,
    first: Callable[[Graph, Rules], Walk],
    walked: Callable[[Graph, Rules, frozenset[str], frozenset[str]], Walk],
) -> Choices:
    """The choices of a walk over a graph in which ops along cut dims are spelled out.

    Args:
        graph: on whole tensors.
        first: a walk that says which values are cut.
        walked: the walk, from the graph, its rules, the sums that are kept, and those that are expected.
    """
    builder = Builder(graph)
    while along := _along_cuts(graph, first):
        graph = spelled_out(graph, along, builder.fresh)
    rules = [rule_for(node) for node in graph.nodes]
    before = walked(graph, rules, frozenset(), frozenset())
    kept = kept_sums(graph, rules, before.sums)
    walk = walked(graph, rules, kept, frozenset(before.sums)) if kept else before
    reduced = {name: walk.after(name) for name in (*walk.sums, *walk.largest) if name not in kept}
    return Choices(graph, tuple(walk.strategies), tuple(rules), reduced)


def along_sequence(graph: Graph, rules: Rules, num_ranks: int) -> Mapping[str, Placement]:
    """Where the sequence is in values, as their readers take them: all inputs are cut along dim 1, and this spreads.

    Args:
        graph: the graph.
        rules: of its nodes.
        num_ranks: ranks along the axis.
    """
    cut = Shard(1)
    seeds = {
        i.value.name: cut
        for i in graph.inputs
        if i.kind is InputKind.input and isinstance(i.value.type, TensorType) and len(i.value.type.shape) > 1
        if cut.divides(i.value.type.shape[1], num_ranks)
    }
    walk = Walk(graph, seeds, num_ranks, rules, frozenset())
    found: dict[str, Placement] = {}
    for node, strategy in zip(graph.nodes, walk.strategies, strict=True):
        for value, place in zip(node.operands, strategy.ins, strict=True):
            if isinstance(place, Shard):
                found.setdefault(value.name, place)
    return found


def views_once(graph: Graph) -> Graph:
    """The graph with one view in the place of several of one value, so that what they are gathered for is sent once."""
    known: dict[Hashable, Value] = {}
    merged: dict[str, Value] = {}
    nodes = []
    for old in graph.nodes:
        node = old.substitute(merged)
        if len(node.results) == 1 and len(node.operands) == 1 and views(graph, node):
            made = known.setdefault((node.op, node.args, node.kwargs, node.phase), node.results[0])
            if made is not node.results[0]:
                merged[node.name] = made
                continue
        nodes.append(node)
    return replace(graph, nodes=tuple(nodes), outputs=tuple(output.substitute(merged) for output in graph.outputs))


def _along_cuts(graph: Graph, first: Callable[[Graph, Rules], Walk]) -> frozenset[str]:
    """Names of nodes whose operands are cut as their ops are not, but what these are defined by is."""
    if not any(node.op in DEFINED for node in graph.nodes):
        return frozenset()
    walk = first(graph, [rule_for(node) for node in graph.nodes])
    return frozenset(
        node.name
        for node in graph.nodes
        if node.op in DEFINED
        for made in (walk.made[v.name] for v in node.operands if v.name in walk.made)
        if isinstance(made, Shard) and dim_of(node) in (None, made.dim) and defined(node, str)
    )


def rule_for(node: Node) -> Rule | None:
    """The rule of a node, of one that is placed along another axis already too; None where its operands are whole."""
    if node.op == "reshard":
        return _of_reshard(node)
    call = meant(node)
    rule = rule_of(Call.of(call)) if "." in call.op else None
    return rule if rule is None or call is node else replace(rule, fixed=rule.ranked)


def _of_reshard(node: Node) -> Rule:
    """The rule of what moves a value along another axis: dims pass, but for those that are put together or cut."""
    call = Call.of(node)
    pairs = zip(call.shape(0), call.out(), strict=True)
    names = [name if old == new else f"_{name}" for name, (old, new) in zip(letters(call.out()), pairs, strict=True)]
    given = " ".join(n if n[0] != "_" else f"{n}_given" for n in names)
    old, new = node.operands[0].tensor, node.results[0].tensor
    adds = P in (*old.placement, *new.placement) and Partial("max") not in old.placement
    return written(call, f"{given} -> {' '.join(names)}", linear=((0,),) if adds else ())


def whole(node: Node) -> Strategy:
    """The strategy of a node without a rule: all whole."""
    return Strategy(
        tuple(R if isinstance(v.type, TensorType) else None for v in node.operands),
        tuple(R if isinstance(v.type, TensorType) else None for v in node.results),
    )


class Walk:
    """One walk over the nodes in their order.

    Attributes:
        strategies: the choice for each node.
        made: how each value is made.
        sums: the values that are made as partial sums.
        largest: those of which ranks have the largest of their parts.
    """

    parameters_count: ClassVar[int] = PARAMETERS_COUNT

    def __init__(
        self,
        graph: Graph,
        seeds: Mapping[str, Placement],
        num_ranks: int,
        rules: Rules,
        kept: frozenset[str],
        tokens: Mapping[str, Placement] | None = None,
        sums: frozenset[str] = frozenset(),
    ) -> None:
        self.num_ranks, self.kept, self.tokens, self.expected = num_ranks, kept, tokens, sums
        self.rest: dict[str, Placement] = {i.value.name: seeds.get(i.value.name, R) for i in graph.inputs}
        self.have: dict[str, set[Placement]] = {name: {place} for name, place in self.rest.items()}
        self.of_parameters = set(graph.param_names)
        self.strategies: list[Strategy] = []
        self.due = gradients_due(graph, rules, seeds, num_ranks)
        self.made: dict[str, Placement | None] = {}
        self.sums: set[str] = set()
        self.largest: set[str] = set()
        is_forward = True
        for node, rule in zip(graph.nodes, rules, strict=True):
            if is_forward and node.phase is not Phase.forward:
                is_forward = False
                self.have = {name: self.kept_places(name) for name in self.have}
            self.strategies.append(self.best(node, rule))
            self.take(node, self.strategies[-1])

    def best(self, node: Node, rule: Rule | None) -> Strategy:
        """The strategy that moves the fewest bytes; of those, the one that cuts the most."""
        if rule is None:
            return whole(node)
        usable = [s for s in rule.strategies(self.num_ranks, self.cuts(node, rule)) if self.is_usable(node, s)]
        return min(usable, key=lambda s: self.cost(node, s))

    def cuts(self, node: Node, rule: Rule) -> list[Cut]:
        """The cuts that a node may have: of its operands as they are there, and of its results as they are due."""
        found = [c for places in self.held(node) for c in cuts_of(rule, places, self.num_ranks)]
        due = [None if d is None else self.due.get(r.name) for d, r in zip(rule.outs, node.results, strict=True)]
        return [*found, *cuts_of(rule, [*(None for _ in node.operands), *due], self.num_ranks)]

    def kept_places(self, name: str) -> set[Placement]:
        """In which of its placements a value of the forward is there in the backward."""
        return {self.rest[name]} if self.tokens is not None else self.have[name]

    def held(self, node: Node) -> Iterator[list[Placement | None]]:
        """The placements in which the operands of a node are there, some of them at a time."""
        found = [sorted(self.have[v.name], key=str) for v in node.operands]
        for number in range(max((len(places) for places in found), default=0)):
            yield [places[number] if number < len(places) else None for places in found]

    def is_usable(self, node: Node, strategy: Strategy) -> bool:
        """Whether there is a way to every placement, each value has one, and sums are read where they are sums."""
        if len({(v.name, p) for v, p in zip(node.operands, strategy.ins, strict=True)}) > len(
            {v.name for v in node.operands}
        ):
            return False
        for value, place in zip(node.results, strategy.outs, strict=True):
            if place == P and value.tensor.dtype not in SUMMED:  # integers are not added up
                return False
        for value, place in zip(node.operands, strategy.ins, strict=True):
            if place is None:
                continue
            have = self.have[value.name]
            if place == P and P not in have and R not in have:
                return False
        is_linear = P in strategy.ins and not any(isinstance(p, Shard) for p in strategy.ins)
        return not is_linear or all(
            P in self.have[v.name] for v, p in zip(node.operands, strategy.ins, strict=True) if p == P
        )

    def cost(self, node: Node, strategy: Strategy) -> tuple[float, float]:
        """Bytes that a rank sends, and bytes that it computes with."""
        sent, local = 0.0, 0.0
        for value, place in {(v.name, p): (v, p) for v, p in zip(node.operands, strategy.ins, strict=True)}.values():
            if place is not None:
                times = self.parameters_count if value.name in self.of_parameters else 1
                sent += times * self.moved(value.tensor, self.have[value.name], place)
        for value, place in zip(node.results, strategy.outs, strict=True):
            if place is not None:
                num_bytes = _num_bytes(value.tensor)
                is_free = value.name in self.kept and (P in strategy.ins or value.name in self.expected)
                if isinstance(place, Partial) and not is_free and self.is_counted(value.name):
                    sent += self.moved(value.tensor, {place}, self.after(value.name) if place == P else R)
                local += num_bytes / self.num_ranks if isinstance(place, Shard) else num_bytes
        return sent, local

    def is_counted(self, name: str) -> bool:
        """Whether what a sum takes to be reduced is a reason against it."""
        return True

    def moved(self, kind: TensorType, have: set[Placement], place: Placement) -> float:
        """Bytes that a rank sends to have a value at a placement."""
        if place in have:
            return 0.0
        return min(wire_bytes(kind, old, place, self.num_ranks) for old in have)

    def after(self, name: str) -> Placement:
        """Where a sum is once it is reduced."""
        found = R if self.tokens is None or name in self.largest else self.tokens.get(name, R)
        return found

    def take(self, node: Node, strategy: Strategy) -> None:
        """Note what is there once a node has run."""
        for value, place in zip(node.operands, strategy.ins, strict=True):
            if place is not None:
                self.have[value.name].add(place)
        for value, place in zip(node.results, strategy.outs, strict=True):
            self.made[value.name] = place
            if isinstance(place, Partial):
                (self.sums if place == P else self.largest).add(value.name)
            is_reduced = isinstance(place, Partial) and value.name not in self.kept
            self.rest[value.name] = self.after(value.name) if is_reduced else place or R
            self.have[value.name] = {self.rest[value.name]}
        if node.operands and all(v.name in self.of_parameters for v in node.operands):
            self.of_parameters.update(r.name for r in node.results)


def trained_values(graph: Graph) -> frozenset[str]:
    """Names of values that come of a parameter, those of parameters among them."""
    found = set(graph.param_names)
    for node in graph.nodes:
        if any(v.name in found for v in node.operands):
            found.update(r.name for r in node.results)
    return frozenset(found)


_PASSED_ON = frozenset({"add", "t", "transpose", "view", "_to_copy", "clone", "reshard"})
"""Ops through which a gradient goes, whose operands lie as it does."""


def gradients_due(
    graph: Graph, rules: Rules, seeds: Mapping[str, Placement], num_ranks: int
) -> Mapping[str, Placement]:
    """Where gradients of cut parameters must be in the end, and so what they are sums and views of."""
    due: dict[str, Placement] = {
        o.value.name: seeds[o.target]
        for o in graph.outputs
        if o.kind is OutputKind.grad and o.value is not None and o.target in seeds
    }
    for node, rule in zip(reversed(graph.nodes), reversed(rules), strict=True):
        if rule is None or node.name not in due or node.op.removeprefix("aten.").split(".")[0] not in _PASSED_ON:
            continue
        for cut in cuts_of(rule, [*(None for _ in node.operands), due[node.name]], num_ranks):
            strategy = rule.with_cut(num_ranks, cut)
            for value, place in zip(node.operands, strategy.ins if strategy else (), strict=bool(strategy)):
                if isinstance(place, Shard):
                    due.setdefault(value.name, place)
    return due


def wire_bytes(kind: TensorType, old: Placement, new: Placement, num_ranks: int) -> float:
    """Bytes that a rank sends where a whole value of this type changes its placement; none of what is free."""
    whole_bytes, share = _num_bytes(kind), (num_ranks - 1) / num_ranks
    match collective(old, new):
        case "all_reduce_start":
            return 2 * share * whole_bytes
        case "all_gather_start" | "reduce_scatter_start":
            return share * whole_bytes
        case "all_to_all_start":
            return share * whole_bytes / num_ranks
    return 2 * share * whole_bytes if isinstance(old, Partial) else 0.0


def _num_bytes(kind: TensorType) -> float:
    found = simplify(kind.numel)
    return float(found if isinstance(found, int) else 1) * kind.dtype.itemsize


def kept_sums(graph: Graph, rules: Rules, made: set[str]) -> frozenset[str]:
    """Partial sums that are not reduced where they are made, but once by what alone reads them, after it adds them."""
    possible, linear = set(made), dict[int, tuple[tuple[int, ...], ...]]()
    for position, (node, rule) in enumerate(zip(graph.nodes, rules, strict=True)):
        groups = rule.linear if rule is not None else ()
        linear[position] = tuple(g for g in groups if g and all(node.operands[i].name in possible for i in g))
        if linear[position]:
            possible.update(r.name for r in node.results)
    returned, sizes = graph.output_names, {r.name: r for n in graph.nodes for r in n.results}
    kept = {name for name in possible if name not in returned and graph.users.get(name)}
    while True:
        dropped = {name for name in kept if not _stays(graph, linear, sizes[name].tensor, name, kept)}
        if not dropped:
            return frozenset(kept)
        kept -= dropped


def _stays(
    graph: Graph, linear: Mapping[int, tuple[tuple[int, ...], ...]], kind: TensorType, name: str, kept: set[str]
) -> bool:
    """Whether one node reads a sum, which is linear in it, with sums that are kept, and makes no more to reduce."""
    if len(graph.users[name]) > 1:
        return False
    node = graph.nodes[position := graph.users[name][0]]
    at = {i for i, v in enumerate(node.operands) if v.name == name}
    if not any(at <= set(g) and all(node.operands[i].name in kept for i in g) for g in linear[position]):
        return False
    return sum(_num_bytes(r.tensor) for r in node.results if r.name not in kept) <= _num_bytes(kind)
