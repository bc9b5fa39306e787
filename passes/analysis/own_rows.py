"""Which rows stay on their ranks along an axis of contexts: tokens that are sorted by expert, and what reads them.

A sort mixes tokens of the whole sequence. Where all that reads what is sorted does so row by row, as the products of
experts do, and puts rows back in place, each rank sorts its own tokens, and no token is sent. From a sort of what is
cut along the sequence, its order is followed through the graph, forward and backward. A sort with a reader that does
not keep to the order stays as it is: what it sorts is gathered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from zgraph.ir import Graph, Node, Placement, Shard, Value
from zgraph.ir.axis_rules import SUMMED
from zgraph.ir.orders import roles_read
from zgraph.ir.rules import Call, Rule, Strategy, meant
from zgraph.ir.rules.own import FILLS, SORTS, begins_order, step_of
from zgraph.ir.rules.roles import Mixed, Order, Role
from zgraph.ir.types import Own

__all__ = ["OwnRows", "own_rows"]


@dataclass(frozen=True)
class OwnRows:
    """Decisions on the nodes of orders.

    Args:
        ways: strategies, by the node's name.
        counts: values that count a rank's own rows; they are not summed over the ranks.
    """

    ways: dict[str, Strategy] = field(default_factory=dict)
    counts: set[str] = field(default_factory=set)


def own_rows(graph: Graph, rules: Sequence[Rule | None], where: Mapping[str, Placement], num_ranks: int) -> OwnRows:
    """The strategies of nodes that read tokens in an order of each rank's own.

    Args:
        graph: on whole tensors.
        rules: of its nodes.
        where: where the sequence is in values, by name.
        num_ranks: ranks along the axis.
    """
    found, made_by = OwnRows(), {node.name: rule for node, rule in zip(graph.nodes, rules, strict=True)}
    for node in graph.nodes:
        if node.op not in SORTS or not begins_order(call := Call.of(node)):
            continue
        place, count = where.get(node.operands[0].name), call.shape(0)[0]
        if not isinstance(place, Shard) or not isinstance(count, int) or not place.divides(count, num_ranks):
            continue
        ids = Role("ids", Order(node.name, count, place.blocks))
        try:
            made = _Follower(graph, rules, made_by, num_ranks, node.operands[0], ids).run()
        except Mixed:
            continue
        if not found.ways.keys() & made.ways.keys():
            found.ways.update(made.ways)
            found.counts.update(made.counts)
    return found


class _Follower:
    """One walk over a graph, with one sort."""

    def __init__(
        self,
        graph: Graph,
        rules: Sequence[Rule | None],
        made_by: Mapping[str, Rule | None],
        num_ranks: int,
        ids: Value,
        role: Role,
    ) -> None:
        self.graph, self.rules, self.made_by, self.num_ranks = graph, rules, made_by, num_ranks
        self.roles = {ids.name: role}
        self.found = OwnRows()
        self.unread: set[str] = set()
        self.has_product = False

    def run(self) -> OwnRows:
        """The strategies.

        Raises:
            Mixed: something does not keep to the order, or nothing multiplies rows by the matrix of their group.
        """
        for node, rule in zip(self.graph.nodes, self.rules, strict=True):
            self.take(node, rule)
        if not self.has_product or any(
            output.value is not None and (output.value.name in self.unread or self.is_followed(output.value))
            for output in self.graph.outputs
        ):
            raise Mixed("what is sorted is returned, or no product reads it")
        return self.found

    def is_followed(self, value: Value) -> bool:
        role = self.roles.get(value.name)
        return role is not None and role.word not in ("ids", "counts")

    def take(self, node: Node, rule: Rule | None) -> None:
        roles = roles_read(node, self.roles, self.graph)
        step = None
        if any(roles):
            step = step_of(Call.of(meant(node)), rule, roles, self.num_ranks)
        if step is None:
            self.leave(node, rule, roles)
            return
        self.found.ways[node.name] = step.way
        for value, role, place in zip(node.operands, roles, step.way.ins, strict=True):
            if isinstance(place, Own) and (role is None or role.word == "range"):
                self.make(value, place, is_range=role is not None)
        for result, role, place in zip(node.results, step.roles, step.way.outs, strict=True):
            if role is not None:
                self.roles[result.name] = role
            elif isinstance(place, Own):
                self.unread.add(result.name)
            if role is not None and role.word == "counts":
                self.found.counts.add(result.name)
        has_counts = any(role is not None and role.word == "counts" for role in roles)
        self.has_product |= has_counts and "grouped_mm" in node.op

    def leave(self, node: Node, rule: Rule | None, roles: Sequence[Role | None]) -> None:
        """Leave a node that has no part in the order as it is, if it can read what it does there."""
        for number, (value, role) in enumerate(zip(node.operands, roles, strict=True)):
            if rule is not None and rule.ins[number] is None:
                continue
            is_counts = role is not None and role.word == "counts"
            if value.name in self.unread or (is_counts and value.tensor.dtype not in SUMMED):
                raise Mixed(f"{node.op} reads what is in an order of the rank's own")

    def make(self, value: Value, place: Placement, *, is_range: bool) -> None:
        """Have what is alike in all rows made in the order: zeros that rows are added to; or a range of numbers.

        Raises:
            Mixed: it is made of something, or read by others.
        """
        if value.name in self.unread:
            self.unread.discard(value.name)
            return
        if value.name in self.roles:  # a range that a sort has made
            return
        maker = self.graph.producers.get(value.name)
        rule = self.made_by.get(maker.name) if maker is not None else None
        is_alone = len(self.graph.users.get(value.name, ())) == 1
        if maker is None or not (is_range or maker.op in FILLS) or not is_alone or rule is None or any(rule.ins):
            raise Mixed(f"%{value.name} is not in the order of what is written to it")
        self.found.ways[maker.name] = Strategy(tuple(None for _ in maker.operands), (place,))
