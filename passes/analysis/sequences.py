"""Where values live along an axis of contexts: cut along the sequence, wherever an op lets its operands be.

All inputs are cut along dim 1, which is free, as ranks of the axis have the same batch. From there the sequence is
followed through the factors of every op. Most ops pass it. Attention does not, since each token attends to others: what
it reads is cut along heads there, by all-to-all, or keys and values are gathered where these are few, whichever moves
fewer bytes. That is context parallelism as DeepSpeed-Ulysses has it (Jacobs et al., 2023) and as Llama 3 has it (2024),
read off the table of sharding rules. Parameters are whole where they are used, so that their gradients are sums over
the parts of the sequence. A mean of losses becomes a quotient of sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import ClassVar

from zgraph.errors import PlacementError
from zgraph.ir import Graph, InputKind, Node, Partial, Placement, Replicate, Shard, TensorType
from zgraph.ir.rules import Call, Rule, Strategy, attention, device_attention
from zgraph.ir.rules.factors import Cut
from zgraph.ir.rules.kept import cuts_of
from zgraph.ir.rules.ring import RING, ring_way
from zgraph.passes.analysis.own_rows import OwnRows, own_rows
from zgraph.passes.analysis.placing import Choices, Rules, Walk, chosen, trained_values, views_once

__all__ = ["SequenceWalk", "choose_along_sequence", "followed"]

R, P = Replicate(), Partial("sum")

ATTENTION = frozenset({*attention.RULES, *device_attention.RULES})

SEQUENCE = Shard(1)
"""Where the sequence is in the inputs of a model."""


def choose_along_sequence(
    graph: Graph, seeds: Mapping[str, Placement], num_ranks: int, *, ring: bool = False
) -> Choices:
    """A strategy for every node of a graph on whole tensors, with the sequence cut.

    Args:
        graph: the graph.
        seeds: the placement of parameters at rest, by name; all others are whole.
        num_ranks: ranks along the axis.
        ring: whether keys and values of attention go round the ranks wherever they can.

    Raises:
        PlacementError: the sequence does not divide, or heads of attention do not.
    """
    inputs = _cut_inputs(graph, num_ranks)

    def walked(
        graph: Graph, rules: Rules, kept: frozenset[str] = frozenset(), sums: frozenset[str] = frozenset()
    ) -> SequenceWalk:
        return SequenceWalk(graph, seeds, num_ranks, rules, kept, sums, followed(graph, rules, inputs), ring=ring)

    found = chosen(views_once(graph), walked, walked)
    _check_attention(found, num_ranks)
    return found


def _cut_inputs(graph: Graph, num_ranks: int) -> dict[str, Placement]:
    """The inputs that are cut. Raises PlacementError if there is none, or if the sequence of one does not divide."""
    found: dict[str, Placement] = {}
    for entry in graph.inputs:
        shape = entry.value.type.shape if isinstance(entry.value.type, TensorType) else ()
        if entry.kind is not InputKind.input or len(shape) < 2 or shape[1] == 1:
            continue
        if not SEQUENCE.divides(shape[1], num_ranks):
            raise PlacementError(
                f"the sequence of an input of shape {tuple(shape)} does not divide over {num_ranks} ranks of context; "
                "pad it to a multiple of them (lengths= does that), or take another context_parallel="
            )
        found[entry.value.name] = SEQUENCE
    if not found:
        raise PlacementError(
            "no input has a sequence, which is dim 1 of inputs of two dims or more; leave context_parallel= out"
        )
    return found


def followed(graph: Graph, rules: Rules, inputs: Mapping[str, Placement]) -> dict[str, Placement]:
    """Where the sequence is in each value that has it, through factors that may be cut and through those that may not.

    Where operands have it in several factors, as queries and keys do, each result has it in the first of them that it
    has. What is made of nothing, as zeros are, has it where its first reader does.
    """
    found = dict(inputs)
    made = {
        r.name
        for node, rule in zip(graph.nodes, rules, strict=True)
        if not node.operands or (rule is not None and not any(rule.ins))
        for r in node.results
    }
    for node, rule in zip(graph.nodes, rules, strict=True):
        if rule is None:
            continue
        cuts: dict[Cut, None] = {}
        for value, dims in zip(node.operands, rule.ins, strict=True):
            if isinstance(place := found.get(value.name), Shard) and (cut := rule.followed(dims, place)) is not None:
                cuts[cut] = None
        for value, dims in zip(node.operands, rule.ins, strict=True):
            if value.name in made and (first := next((p for c in cuts if (p := rule.place(dims, c))), None)):
                found.setdefault(value.name, first)
        for result, dims in zip(node.results, rule.outs, strict=True):
            places = [place for cut in cuts if (place := rule.place(dims, cut)) is not None]
            if places:
                found[result.name] = places[0]
    return found


class SequenceWalk(Walk):
    """A walk that keeps the sequence cut.

    Bytes of parameters count for nothing: they are gathered whatever is chosen, and their gradients are reduced.
    """

    parameters_count: ClassVar[int] = 0
    keeps_orders: ClassVar[bool] = True
    """Whether rows that are sorted stay on their ranks."""

    def __init__(
        self,
        graph: Graph,
        seeds: Mapping[str, Placement],
        num_ranks: int,
        rules: Rules,
        kept: frozenset[str],
        sums: frozenset[str],
        tokens: Mapping[str, Placement],
        *,
        ring: bool = False,
    ) -> None:
        self.ring = ring
        self.trained, self.where = trained_values(graph), tokens
        self.shared = {name for name, users in graph.users.items() if len(users) > 1}
        self.own = own_rows(graph, rules, tokens, num_ranks) if self.keeps_orders else OwnRows()
        super().__init__(graph, seeds, num_ranks, rules, kept, tokens, sums)

    def best(self, node: Node, rule: Rule | None) -> Strategy:
        """The way in a rank's own order, where a node has a part in one; of attention that would be whole, the way in
        which keys and values go round.
        """
        way = self.own.ways.get(node.name) or super().best(node, rule)
        if node.op in RING and (self.ring or not any(isinstance(place, Shard) for place in way.ins)):
            return ring_way(Call.of(node), self.num_ranks) or way
        return way

    def take(self, node: Node, strategy: Strategy) -> None:
        """Note what is there; counts of a rank's own rows stay its own."""
        super().take(node, strategy)
        for name in self.own.counts.intersection(r.name for r in node.results):
            self.sums.discard(name)
            self.rest[name], self.have[name] = P, {P}

    def cuts(self, node: Node, rule: Rule) -> list[Cut]:
        """The cuts where the sequence is, and those of operands as they are there if no byte is sent for them.

        Where the former would have to gather the sequence of an operand, those of the op's other factors too. What
        several nodes read is brought to where its sequence is before the first of them, and so but once.
        """
        ours = [v.name in self.trained and v.name not in self.of_parameters for v in node.operands]
        values = (*node.operands, *node.results)
        tokens = [None if v.name in self.of_parameters else self.where.get(v.name) for v in values]
        if not any(rule.ins):
            return cuts_of(rule, tokens, self.num_ranks)
        if not any(r.name in self.trained for r in node.results) or not (any(ours) or any(tokens)):
            return []
        found = cuts_of(rule, tokens, self.num_ranks)
        if not any(self.keeps_parts(strategy, tokens) for strategy in self.ways(rule, found)):
            found += self.others(rule)
        elif any(where is not None and v.name in self.shared for v, where in zip(node.operands, tokens, strict=False)):
            return found
        for places in self.held(node):
            mine = [p if is_ours else None for p, is_ours in zip(places, ours, strict=True)]
            for cut in cuts_of(rule, mine, self.num_ranks):
                found += [cut for s in self.ways(rule, [cut]) if self.is_usable(node, s) and not self.cost(node, s)[0]]
        return found

    def ways(self, rule: Rule, cuts: Iterable[Cut]) -> Iterator[Strategy]:
        """The strategies of cuts."""
        return (way for cut in cuts if (way := rule.with_cut(self.num_ranks, cut)) is not None)

    def keeps_parts(self, strategy: Strategy, tokens: Sequence[Placement | None]) -> bool:
        """Whether all operands that have the sequence are in parts."""
        return all(isinstance(p, Shard) for p, where in zip(strategy.ins, tokens, strict=False) if where is not None)

    def others(self, rule: Rule) -> list[Cut]:
        """The cuts of single factors of a rule, but for rows of a batch: those are for the data axes."""
        single: list[Cut] = [(factor, (1,)) for factor in rule.sizes if rule.allows((factor, (1,)), self.num_ranks)]
        places = {cut: [rule.place(dims, cut) for dims in (*rule.ins, *rule.outs)] for cut in single}
        return [cut for cut, found in places.items() if all(place is None or place.dim for place in found)]

    def is_counted(self, name: str) -> bool:
        """Whether a sum has the sequence; one without, of a parameter's gradient, is reduced whatever is chosen."""
        return name in self.where

    def moved(self, kind: TensorType, have: set[Placement], place: Placement) -> float:
        """Bytes that a rank sends to have a value at a placement; times the ranks for the whole of what was in parts.

        That would take as many times the memory, which the axis is there to divide.
        """
        found = super().moved(kind, have, place)
        return self.num_ranks * found if place == R else found

    def after(self, name: str) -> Placement:
        """Where a sum is once it is reduced: along the sequence, or where its parameter lies."""
        if name in self.largest:
            return R
        return self.where.get(name) or self.due.get(name, R)

    def kept_places(self, name: str) -> set[Placement]:
        """Parts are kept for the backward; what is gathered is gathered again."""
        return {self.rest[name], *(place for place in self.have[name] if isinstance(place, Shard))}


def _check_attention(found: Choices, num_ranks: int) -> None:
    """Refuse attention that every rank would compute all of. Raises PlacementError."""
    for node, strategy in zip(found.graph.nodes, found.strategies, strict=True):
        if node.op not in ATTENTION or any(isinstance(place, Shard) for place in strategy.ins):
            continue
        first = int("backward" in node.op)
        queries, keys = (v.tensor.shape for v in node.operands[first : first + 2])
        raise PlacementError(
            f"{node.op} of {node.origin.module or 'the model'} has {queries[1]} heads of queries and {keys[1]} of "
            f"keys, which do not divide over {num_ranks} ranks of context, and keys and values do not go round them: "
            "that is for attention of processors, of a sequence to itself; take a context_parallel= that divides the "
            "heads, or attention without dropout"
        )
