"""Whether a node of a placed graph keeps to its rule along a model axis."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from zgraph.ir.graph import Graph, Node, map_values
from zgraph.ir.rules.factors import Call, Cut, Rule, Strategy
from zgraph.ir.rules.grouped import placed_by_groups
from zgraph.ir.rules.local import localised, whole_node
from zgraph.ir.rules.own import own_ways
from zgraph.ir.rules.ring import ring_way
from zgraph.ir.rules.table import rule_of
from zgraph.ir.types import Grouped, Mesh, Placement, Replicate, Shard, TensorType, model_axes

__all__ = ["broken_rule", "cuts_of", "gathered_for", "places_of"]


def places_of(node: Node, index: int) -> tuple[Placement | None, ...]:
    """How the operands and then the results of a node are placed along an axis; None of what is no tensor."""
    values = (*node.operands, *node.results)
    return tuple(v.type.placement[index] if isinstance(v.type, TensorType) else None for v in values)


def cuts_of(rule: Rule, places: Sequence[Placement | None], num_ranks: int) -> list[Cut]:
    """The cuts that place tensors so, those of operands and then those of results."""
    dims = (*rule.ins, *rule.outs)
    found = [rule.cut(d, p, num_ranks) for d, p in zip(dims, places, strict=False) if isinstance(p, Shard)]
    return [cut for cut in dict.fromkeys(found) if cut is not None]


def broken_rule(node: Node, mesh: Mesh, index: int, *, knows_rank: bool = False) -> str:
    """In what a node breaks its op's sharding rule along a model axis; empty if it keeps it.

    Args:
        node: the node.
        mesh: of the graph.
        index: the number of the axis.
        knows_rank: whether the op knows its rank along the axis, and so looks up what its rank has.
    """
    places, num_ranks = places_of(node, index), mesh[index].size
    if all(place is None or place == Replicate() for place in places) and not knows_rank:
        return ""
    wanted = f"along {mesh[index].name}, {node.op} cannot make {_listed(places[len(node.operands) :])} of "
    wanted += _listed(places[: len(node.operands)])
    try:
        for inner in range(len(model_axes(mesh)) - 1, index, -1):  # these cut what this axis has left
            node = whole_node(node, inner, mesh[inner].size)
        whole = whole_node(node, index, num_ranks)
        rule = rule_of(call := Call.of(whole))
        special = [ring_way(call, num_ranks)] if knows_rank else own_ways(call, rule, places, num_ranks)
    except ValueError as error:
        return f"{wanted}: {error}"
    if rule is None and not any(special):
        return f"{wanted}: it has no sharding rule, so its operands must be whole"
    ways = [*special, *(_ways(rule, places, num_ranks, knows_rank=knows_rank) if rule is not None else ())]
    if not any(way is not None and _fits(way, places, len(node.operands)) for way in ways):
        return f"{wanted} by its sharding rule"
    own = {v.name: v for v in node.operands}
    if tuple(map_values(a, own) for a in localised(whole, rule, places, num_ranks)) != node.args:
        return f"has sizes among its arguments that are not those of a rank's part along {mesh[index].name}"
    return ""


def _ways(
    rule: Rule, places: tuple[Placement | None, ...], num_ranks: int, *, knows_rank: bool
) -> Sequence[Strategy | None]:
    """The strategies of a rule by which tensors may be placed so."""
    if any(isinstance(p, Grouped) for d, p in zip((*rule.ins, *rule.outs), places, strict=True) if d is not None):
        return [placed_by_groups(rule, places)] if knows_rank is (rule.groups is not None) else []
    cuts = [c for c in cuts_of(rule, places, num_ranks) if (c[0] in rule.ranked) is knows_rank]
    return [rule.with_cut(num_ranks, cut) for cut in cuts] if knows_rank else rule.strategies(num_ranks, cuts)


def gathered_for(graph: Graph) -> Mapping[str, int]:
    """How many values a lowered graph gathers, or sums, along model axes for ops without a sharding rule, by op."""
    found: Counter[str] = Counter()
    for node in graph.nodes:
        if "." not in node.op or rule_of(Call.of(node)) is not None:
            continue
        for value in {v.name: v for v in node.operands}.values():
            maker = graph.producers.get(value.name)
            start = graph.producers.get(maker.operands[0].name) if maker is not None and maker.op == "wait" else None
            found[node.op] += start is not None and start.option("axis") is not None
    return {op: count for op, count in sorted(found.items()) if count}


def _fits(strategy: Strategy, places: tuple[Placement | None, ...], count: int) -> bool:
    ins = zip(strategy.ins, places[:count], strict=True)
    outs = zip(strategy.outs, places[count:], strict=True)
    return all(a is None or a == b for a, b in ins) and all(a is None or a == b for a, b in outs)


def _listed(places: tuple[Placement | None, ...]) -> str:
    return "(" + ", ".join("-" if p is None else str(p) for p in places) + ")"
