"""Orders of rows: which sort has put what a rank has in an order of its own, followed through a placed graph.

What is read in an order, and what its rows are counted and put back by, are of one sort; `zgraph.ir.rules.own` says so
of an op alone. A sort that is computed again, of the same integers, makes the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping

from zgraph.ir.graph import Arg, Graph, Node, Value
from zgraph.ir.ops import OPS, is_pure
from zgraph.ir.rules import Call, meant, rule_of, whole_node
from zgraph.ir.rules.kept import places_of
from zgraph.ir.rules.own import FILLS, begins_order, step_of
from zgraph.ir.rules.ranked import PARTS, ROUTED
from zgraph.ir.rules.roles import Mixed, Order, Role
from zgraph.ir.types import Own, Shard, TensorType, model_axes

__all__ = ["orders", "roles_read"]

Fault = tuple[int | None, str]

_MOVES = frozenset({"reshard", "wait", "copy", "slice", "pending", *(n for n, row in OPS.items() if row.transfer)}) - {
    *ROUTED.values()
}
"""Ops that leave a value what it is, wherever it goes."""

_KNOW_RANKS = frozenset({*PARTS.values(), *ROUTED.values()})


def orders(graph: Graph) -> Iterator[Fault]:
    """Rows in an order of a rank's own are read by that order alone, and put back by its inverse."""
    if not model_axes(graph.mesh):
        return
    kinds = [r.type for node in graph.nodes for r in node.results if isinstance(r.type, TensorType)]
    for index, axis in enumerate(model_axes(graph.mesh)):
        if any(len(kind.placement) > index and isinstance(kind.placement[index], Own) for kind in kinds):
            yield from _Follower(graph, index, axis.size).run()


def roles_read(
    node: Node, roles: Mapping[str, Role], graph: Graph, whole: Callable[[Node], Node] = lambda node: node
) -> list[Role | None]:
    """Roles of the operands of a node, where a range that it writes in an order is one, too.

    Args:
        node: of the graph.
        roles: by the value's name.
        graph: the graph.
        whole: makes the node on the tensors of all ranks of one on parts.
    """
    found = [roles.get(v.name) for v in node.operands]
    order = next((role.order for role in found if role is not None), None)
    if order is None or "index_put" not in node.op:
        return found
    for number, value in enumerate(node.operands):
        maker = graph.producers.get(value.name)
        if found[number] is None and maker is not None and maker.op == "aten.arange.default":
            if whole(maker).args == (order.num_rows,):
                found[number] = Role("range", order)
    return found


class _Follower:
    """One walk along one axis."""

    def __init__(self, graph: Graph, index: int, num_ranks: int) -> None:
        self.graph, self.index, self.num_ranks = graph, index, num_ranks
        self.roles: dict[str, Role] = {}

    def run(self) -> Iterator[Fault]:
        numbers = _numbers(self.graph)
        for node in self.graph.nodes:
            places = places_of(node, self.index)
            if isinstance(places[-1], Own) and isinstance(places[0], Shard) and begins_order(call := self.call(node)):
                count = call.shape(0)[0]
                assert isinstance(count, int)
                order = Order(numbers[node.results[1].name], count, places[0].blocks)
                self.roles[node.operands[0].name] = Role("ids", order)
        for position, node in enumerate(self.graph.nodes):
            if wrong := self.step(node):
                yield position, wrong
                return
        for output in self.graph.outputs:
            if output.value is not None and self.is_followed(output.value):
                yield None, f"returns %{output.value.name}, which is in an order of the rank's own"

    def is_followed(self, value: Value) -> bool:
        """Whether only what is of the same order may read a value."""
        role = self.roles.get(value.name)
        return role is not None and role.word not in ("ids", "counts")

    def whole(self, node: Node) -> Node:
        """A node on the tensors of all ranks of all model axes."""
        for index in reversed(range(len(model_axes(self.graph.mesh)))):
            node = whole_node(node, index, self.graph.mesh[index].size)
        return node

    def call(self, node: Node) -> Call:
        return Call.of(self.whole(meant(node)))

    def step(self, node: Node) -> str:
        """Follow a node; in what it is wrong, or nothing."""
        if node.op == "release":
            return ""
        places, roles = places_of(node, self.index), roles_read(node, self.roles, self.graph, self.whole)
        has_own = any(isinstance(place, Own) for place in places)
        if not has_own and not any(map(self.is_followed, node.operands)) and not any(roles):
            return ""
        if node.op in OPS and node.op not in _KNOW_RANKS:
            return self.carry(node)
        if node.op in ROUTED.values():
            counts = roles.pop()
            places = (*places[: len(roles)], *places[len(roles) + 1 :])
            roles_here = [role for role in roles if role is not None and role.word != "ids"]
            if roles_here and (counts is None or counts.word != "counts" or counts.order != roles_here[0].order):
                return "sends rows in an order of the rank's own by counts of another"
        call = self.call(node)
        try:
            step = step_of(call, rule_of(call), roles, self.num_ranks)
        except Mixed as error:
            return str(error)
        if step is None:
            is_made = (rule := rule_of(call)) is not None and not any(rule.ins)
            return "" if is_made or not has_own else "has rows in an order of the rank's own that no sort has made"
        wanted = (*step.way.ins, *step.way.outs)
        if any(w is not None and w != have for w, have in zip(wanted, places, strict=True)):
            return f"takes rows in an order of the rank's own as {list(map(str, places))}, not as {[*map(str, wanted)]}"
        for value, role, place in zip(node.operands, roles, step.way.ins, strict=False):
            if isinstance(place, Own) and role is None and not self.is_alike(value):
                return f"reads %{value.name}, which is not in the order of the other rows"
        for result, role in zip(node.results, step.roles, strict=True):
            if role is not None:
                self.roles[result.name] = role
        return ""

    def is_alike(self, value: Value) -> bool:
        """Whether all rows of a value are alike, so that it is in any order."""
        maker = self.graph.producers.get(value.name)
        return maker is not None and maker.op in FILLS

    def carry(self, node: Node) -> str:
        """Follow an op of zgraph's own, which leaves a value as it is, or moves it along another axis."""
        if len(node.operands) == len(node.results) == 1:
            (value,), (result,) = node.operands, node.results
            if places_of(node, self.index)[0] == places_of(node, self.index)[1] and value.name in self.roles:
                self.roles[result.name] = self.roles[value.name]
                return ""
        is_moved = any(map(self.is_followed, node.operands))
        return "moves, or packs, rows in an order of the rank's own" if is_moved else ""


def _numbers(graph: Graph) -> Mapping[str, int]:
    """A number for each value: the same where the same is computed of the same."""
    known: dict[Hashable, int] = {}
    found: dict[str, int] = {}
    packed: dict[int, list[int]] = {}

    def of(*key: Hashable) -> int:
        return known.setdefault(key, len(known))

    def constant(arg: Arg) -> Hashable:
        if isinstance(arg, Value):
            return ("value", found.get(arg.name, -1))
        return tuple(map(constant, arg)) if isinstance(arg, tuple) else (type(arg).__name__, str(arg))

    for entry in graph.inputs:
        found[entry.value.name] = of("input", entry.value.name)
    for node in graph.nodes:
        if node.op == "pack":
            made = of("pack", *(found.get(v.name, -1) for v in node.operands))
            packed[made] = [found.get(v.name, -1) for v in node.operands]
            found[node.name] = made
            continue
        if node.op == "unpack" and (members := packed.get(found.get(node.operands[0].name, -1))):
            found.update((result.name, number) for result, number in zip(node.results, members, strict=True))
            continue
        if node.op in _MOVES and len(node.operands) == len(node.results):  # what moves stays what it is
            pairs = zip(node.results, node.operands, strict=True)
            found.update((result.name, found.get(value.name, -1)) for result, value in pairs)
            continue
        own = () if is_pure(graph, node) else (node.name,)
        kept = tuple(map(constant, node.args)), tuple((name, constant(arg)) for name, arg in node.kwargs)
        for number, result in enumerate(node.results):
            found[result.name] = of(node.op, *own, kept, number)
    return found
