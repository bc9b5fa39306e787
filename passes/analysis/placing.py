"""Where values live along one model axis: each node takes the strategy of its rule that moves the fewest bytes.

Parameters are where their users want them. From there cuts spread: `x @ w` with columns of w cut has them cut, and a
product over what is cut makes a partial sum. A partial sum is reduced at once, unless all that reads it is linear in it
and adds it to sums like it, as where the gradients of three projections of one input meet: they are reduced once. This
is Megatron's pattern where the parameters are placed as Megatron places them (Shoeybi et al., 2019).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from zgraph.ir import Graph, Node, Partial, Placement, Replicate, Shard, TensorType
from zgraph.ir.axis_rules import collective
from zgraph.ir.rules import Call, Rule, Strategy, rule_of
from zgraph.ir.rules.kept import cuts_of
from zgraph.ir.symbols import simplify

R, P = Replicate(), Partial("sum")

PARAMETERS_COUNT = 1000
"""Bytes of parameters count as often as this: they lie where their user wants them."""


@dataclass(frozen=True)
class Choices:
    """A choice for every node.

    Args:
        strategies: by the node's position.
        rules: of each node; None where it has none.
        reduced: values that are partial sums where they are made, and are reduced there.
        views: values that are made where they are read: wherever what they view is.
        ways: how a value comes to a placement, where that was chosen: from another placement of it, or of what it
            views.
    """

    strategies: tuple[Strategy, ...]
    rules: tuple[Rule | None, ...]
    reduced: frozenset[str]
    views: frozenset[str] = frozenset()
    ways: Mapping[tuple[str, Placement], tuple[str, Placement]] = field(default_factory=dict)

    def any_place(self, name: str) -> Placement:
        """A placement that a view can have, for ops that read its type alone."""
        return next((place for viewed, place in self.ways if viewed == name), R)


def choose(graph: Graph, seeds: Mapping[str, Placement], num_ranks: int) -> Choices:
    """A strategy for every node of a graph on whole tensors.

    Args:
        graph: the graph.
        seeds: the placement of inputs, by name; all others are whole.
        num_ranks: ranks along the axis.
    """
    rules = [_rule(node) for node in graph.nodes]
    first = _Walk(graph, seeds, num_ranks, rules, frozenset())
    kept = _kept_sums(graph, rules, first.sums)
    walk = _Walk(graph, seeds, num_ranks, rules, kept) if kept else first
    return Choices(tuple(walk.strategies), tuple(rules), frozenset(walk.sums - kept))


def _rule(node: Node) -> Rule | None:
    return rule_of(Call.of(node)) if node.op.startswith("aten.") else None


def whole(node: Node) -> Strategy:
    """The strategy of a node without a rule: all whole."""
    return Strategy(
        tuple(R if isinstance(v.type, TensorType) else None for v in node.operands),
        tuple(R if isinstance(v.type, TensorType) else None for v in node.results),
    )


class _Walk:
    """One walk over the nodes in their order.

    Attributes:
        strategies: the choice for each node.
        sums: the values that are made as partial sums.
    """

    def __init__(
        self,
        graph: Graph,
        seeds: Mapping[str, Placement],
        num_ranks: int,
        rules: Sequence[Rule | None],
        kept: frozenset[str],
    ) -> None:
        self.num_ranks, self.kept = num_ranks, kept
        self.have: dict[str, set[Placement]] = {i.value.name: {seeds.get(i.value.name, R)} for i in graph.inputs}
        self.of_parameters = set(graph.param_names)
        self.strategies: list[Strategy] = []
        self.sums: set[str] = set()
        for node, rule in zip(graph.nodes, rules, strict=True):
            self.strategies.append(self.best(node, rule))
            self.take(node, self.strategies[-1])

    def best(self, node: Node, rule: Rule | None) -> Strategy:
        """The strategy that moves the fewest bytes; of those, the one that cuts the most."""
        if rule is None:
            return whole(node)
        cuts = [c for places in self.held(node) for c in cuts_of(rule, places, self.num_ranks)]
        usable = [s for s in rule.strategies(self.num_ranks, cuts) if self.is_usable(node, s)]
        return min(usable, key=lambda s: self.cost(node, s))

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
                times = PARAMETERS_COUNT if value.name in self.of_parameters else 1
                sent += times * self.moved(value.tensor, self.have[value.name], place)
        for value, place in zip(node.results, strategy.outs, strict=True):
            if place is not None:
                num_bytes = _num_bytes(value.tensor)
                sent += self.moved(value.tensor, {P}, R) if place == P and value.name not in self.kept else 0.0
                local += num_bytes / self.num_ranks if isinstance(place, Shard) else num_bytes
        return sent, local

    def moved(self, kind: TensorType, have: set[Placement], place: Placement) -> float:
        """Bytes that a rank sends to have a value at a placement."""
        if place in have:
            return 0.0
        return min(wire_bytes(kind, old, place, self.num_ranks) for old in have)

    def take(self, node: Node, strategy: Strategy) -> None:
        """Note what is there once a node has run."""
        for value, place in zip(node.operands, strategy.ins, strict=True):
            if place is not None:
                self.have[value.name].add(place)
        for value, place in zip(node.results, strategy.outs, strict=True):
            if place == P:
                self.sums.add(value.name)
            self.have[value.name] = {R if place is None or (place == P and value.name not in self.kept) else place}
        if node.operands and all(v.name in self.of_parameters for v in node.operands):
            self.of_parameters.update(r.name for r in node.results)


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
    return 0.0 if old != P else 2 * share * whole_bytes


def _num_bytes(kind: TensorType) -> float:
    found = simplify(kind.numel)
    return float(found if isinstance(found, int) else 1) * kind.dtype.itemsize


def _kept_sums(graph: Graph, rules: Sequence[Rule | None], made: set[str]) -> frozenset[str]:
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
