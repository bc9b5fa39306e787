"""Where values live along an axis of experts: the batch in parts, and each token at the experts that it is routed to.

All inputs are cut along their rows, and parameters are whole where they are used, as along an axis of data. Outputs of
the model that have rows stay cut too: each rank is returned those of its own. The matrices of experts are not whole:
each rank has those of some experts, and multiplies the tokens of all ranks that are routed to these. From the products
of groups of rows (`_grouped_mm`), what belongs to a group is followed forward and backward through ops that pass rows,
to where rows are looked up by index, or added: there tokens are sent to the ranks of their experts, or back (GShard,
Lepikhin et al., 2020). An expert without tokens has a group of no rows.

Room is made on each rank for the rows of all experts, as all tokens may be routed to those of one rank: nothing is
dropped. What is sent is what is routed to another rank, and no more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from zgraph.errors import PlacementError
from zgraph.ir import (
    Graph,
    Grouped,
    InputKind,
    Node,
    OutputKind,
    Placement,
    Replicate,
    Shard,
    TensorType,
    Value,
)
from zgraph.ir.ops import is_pure
from zgraph.ir.rules import ROUTED, Rule, Strategy
from zgraph.ir.rules.factors import Cut
from zgraph.ir.rules.grouped import by_groups, row_factor
from zgraph.passes.analysis.placing import Choices, Rules, chosen, rule_for, views_once
from zgraph.passes.analysis.sequences import SequenceWalk, followed

__all__ = ["choose_by_experts"]

R, ROWS, GROUPS = Replicate(), Shard(0), Grouped(0)


@dataclass(frozen=True)
class Plan:
    """Decisions on nodes before the others follow.

    Args:
        ways: strategies, by the node's name.
        routed: the running counts by which rows find their ranks, by the name of the node that looks rows up or adds
            them.
        rows: values with rows by groups: the dim that is these, and the counts.
    """

    ways: dict[str, Strategy] = field(default_factory=dict)
    routed: dict[str, Value] = field(default_factory=dict)
    rows: dict[str, tuple[int, Value]] = field(default_factory=dict)


def choose_by_experts(graph: Graph, seeds: Mapping[str, Placement], num_ranks: int) -> Choices:
    """A strategy for every node of a graph on whole tensors, with each token at its experts.

    Args:
        graph: the graph.
        seeds: the placement of parameters at rest, by name; all others are whole.
        num_ranks: ranks along the axis.

    Raises:
        PlacementError: there are no experts, what they make is mixed, or the batch does not divide.
    """
    graph, tokens = views_once(graph), dict(_cut_inputs(graph, num_ranks))
    plan = _Tracer(graph, seeds, num_ranks).run()
    graph = _after_counts(graph, plan.routed)
    for node in graph.nodes:
        if node.name in plan.routed:
            tokens[node.name] = ROWS

    returned, given = _outside(graph, followed(graph, [rule_for(node) for node in graph.nodes], tokens), num_ranks)
    seeds = {**seeds, **given}

    def walked(
        graph: Graph, rules: Rules, kept: frozenset[str] = frozenset(), sums: frozenset[str] = frozenset()
    ) -> ExpertWalk:
        return ExpertWalk(graph, seeds, num_ranks, rules, kept, sums, followed(graph, rules, tokens), plan)

    found = chosen(graph, walked, walked)
    _check_whole(found, plan)
    return replace(found, routed=plan.routed, returned=returned, given=given)


def _outside(
    graph: Graph, rows: Mapping[str, Placement], num_ranks: int
) -> tuple[dict[str, Placement], dict[str, Placement]]:
    """Outputs and tangents that have rows of the batch: a rank is returned its own, and gives these to the backward.

    A tangent is known by its type: what is like an output that is cut, is cut as that is.

    Args:
        graph: the graph.
        rows: where rows of the batch are in each value.
        num_ranks: ranks along the axis.

    Raises:
        PlacementError: of two outputs of one type one has rows of the batch and the other does not, so that nothing
            tells their tangents apart.
    """
    outputs = [o.value for o in graph.outputs if o.kind is OutputKind.output and o.value is not None]
    returned = dict[str, Placement]()
    like: dict[TensorType | None, set[Placement]] = {}
    for value in outputs:
        place = rows.get(value.name)
        if isinstance(place, Shard) and place.divides(value.tensor.shape[place.dim], num_ranks):
            returned[value.name] = place
        like.setdefault(_plain(value), set()).add(returned.get(value.name, R))
    given = dict[str, Placement]()
    for tangent in (i.value for i in graph.inputs if i.kind is InputKind.tangent):
        places = like.get(_plain(tangent), {R})
        if len(places) > 1:
            raise PlacementError(
                f"two outputs are {_plain(tangent)}, of which one has the rows of the batch and the other has not, and "
                "both are given gradients: return one of them detached, or in another shape; or leave expert_parallel= "
                "out"
            )
        (place,) = places
        if isinstance(place, Shard):
            given[tangent.name] = place
    return returned, given


def _plain(value: Value) -> TensorType | None:
    """A value's dtype and shape."""
    return TensorType(value.type.dtype, value.type.shape) if isinstance(value.type, TensorType) else None


def _cut_inputs(graph: Graph, num_ranks: int) -> Iterator[tuple[str, Placement]]:
    """The inputs that are cut. Raises PlacementError if the batch does not divide, or no input has one."""
    none = True
    for entry in graph.inputs:
        shape = entry.value.type.shape if isinstance(entry.value.type, TensorType) else ()
        if entry.kind is not InputKind.input or not shape or shape[0] == 1:
            continue
        if not ROWS.divides(shape[0], num_ranks):
            raise PlacementError(
                f"an input of shape {tuple(shape)} does not divide over {num_ranks} ranks of experts, each of which "
                "computes some of its rows; give batches of a multiple of them, or take another expert_parallel="
            )
        none = False
        yield entry.value.name, ROWS
    if none:
        raise PlacementError("no input has rows to divide over the ranks of experts; leave expert_parallel= out")


class ExpertWalk(SequenceWalk):
    """A walk that keeps the batch cut, and follows a plan for rows of experts."""

    keeps_orders: ClassVar[bool] = False

    def __init__(
        self,
        graph: Graph,
        seeds: Mapping[str, Placement],
        num_ranks: int,
        rules: Rules,
        kept: frozenset[str],
        sums: frozenset[str],
        tokens: Mapping[str, Placement],
        plan: Plan,
    ) -> None:
        self.plan = plan
        super().__init__(graph, seeds, num_ranks, rules, kept, sums, tokens)

    def cuts(self, node: Node, rule: Rule) -> list[Cut]:
        """Those of a sequence; none of numbers of tokens and experts that are whole already."""
        if node.operands and all(_is_number(v) and R in self.have[v.name] for v in node.operands):
            return []
        return super().cuts(node, rule)

    def best(self, node: Node, rule: Rule | None) -> Strategy:
        return self.plan.ways.get(node.name) or super().best(node, rule)


class _Tracer:
    """Finds the products of experts, and all that belongs to a group of their rows."""

    def __init__(self, graph: Graph, seeds: Mapping[str, Placement], num_ranks: int) -> None:
        self.graph, self.num_ranks, self.plan = graph, num_ranks, Plan()
        self.rules = [rule_for(node) for node in graph.nodes]
        self.at = {r.name: at for at, node in enumerate(graph.nodes) for r in node.results}
        self.matrices: dict[str, Shard] = {
            entry.value.name: ROWS for entry in graph.params if seeds.get(entry.value.name) == ROWS
        }
        self.rows = self.plan.rows
        self.todo: list[str] = []

    def run(self) -> Plan:
        found = False
        for node, rule in zip(self.graph.nodes, self.rules, strict=True):
            if rule is None:
                continue
            if rule.groups and any(
                self.is_of_experts(v, d, rule) for v, d in zip(node.operands, rule.ins, strict=True)
            ):
                found = True
                self.take(node, rule, rule.groups[0], self.ends(node))
            elif node.operands and all(v.name in self.matrices for v in node.operands):
                self.follow_matrix(node, rule)
        if not found:
            raise PlacementError(
                "no op multiplies groups of rows by the experts that are cut; where transformers has the experts, set "
                'config._experts_implementation = "grouped_mm"; in a model of your own, multiply by '
                "torch.nn.functional.grouped_mm, or leave expert_parallel= out"
            )
        self.keep_used_matrices()
        while self.todo:
            self.spread(self.todo.pop())
        return self.plan

    def is_of_experts(self, value: Value, dims: object, rule: Rule) -> bool:
        """Whether an operand has the matrices of experts, one a group."""
        assert rule.groups is not None
        place = self.matrices.get(value.name)
        return place is not None and isinstance(dims, tuple) and dims[place.dim] == (rule.groups[1],)

    def ends(self, node: Node) -> Value:
        """The running counts of a product's rows."""
        found = node.args[2] if len(node.args) > 2 else node.option("offs")
        if not isinstance(found, Value):
            raise self.mixed(node, "it has no running counts of rows")
        return found

    def follow_matrix(self, node: Node, rule: Rule) -> None:
        """Place views and casts of the matrices alone."""
        places = (self.matrices[v.name] for v in node.operands)
        cuts = {rule.cut(dims, place, self.num_ranks) for dims, place in zip(rule.ins, places, strict=True) if dims}
        if len(cuts) != 1 or (cut := cuts.pop()) is None or (way := rule.with_cut(self.num_ranks, cut)) is None:
            return
        if all(isinstance(place, Shard) for place in way.outs):
            self.plan.ways[node.name] = way
            for result, place in zip(node.results, way.outs, strict=True):
                if isinstance(place, Shard):
                    self.matrices[result.name] = place

    def keep_used_matrices(self) -> None:
        """Forget what is made of parameters that no product of experts reads: it is whole, as all else."""
        used: set[str] = set()
        for node in reversed(self.graph.nodes):
            is_product = node.name in self.plan.ways and any(
                isinstance(p, Grouped) for p in self.plan.ways[node.name].outs
            )
            if is_product or any(r.name in used for r in node.results):
                used.update(v.name for v in node.operands if v.name in self.matrices)
            elif node.name in self.matrices:
                del self.plan.ways[node.name]

    def take(self, node: Node, rule: Rule, factor: str, ends: Value) -> None:
        """Place what a node reads and makes by groups."""
        way = by_groups(rule, factor)
        if way is None:
            raise self.mixed(node, "it mixes rows of several experts")
        if self.plan.ways.setdefault(node.name, way) != way:
            raise self.mixed(node, "it reads rows by two dims")
        places = (*zip(node.operands, way.ins, strict=True), *zip(node.results, way.outs, strict=True))
        for value, place in places:
            if isinstance(place, Grouped):
                self.note(node, value, place.dim, ends)

    def note(self, node: Node, value: Value, dim: int, ends: Value) -> None:
        """That a dim of a value is rows by groups."""
        if value.name not in self.rows:
            self.rows[value.name] = dim, ends
            self.todo.append(value.name)
        known, counts = self.rows[value.name]
        if known != dim or counts.name != ends.name:
            raise self.mixed(node, "it reads rows of two layers of experts")

    def spread(self, name: str) -> None:
        """Place the nodes around a value whose rows are by groups."""
        dim, ends = self.rows[name]
        if name not in self.at:
            raise PlacementError(
                f"%{name} is an input of the model whose rows belong to experts; route tokens inside of the model, or "
                "leave expert_parallel= out"
            )
        for at in (self.at[name], *self.graph.users.get(name, ())):
            node, rule = self.graph.nodes[at], self.rules[at]
            if dim == 0 and self.route(node, name, ends):
                continue
            if rule is None:
                raise self.mixed(node, "it has no sharding rule")
            tensors = (*zip(node.operands, rule.ins, strict=True), *zip(node.results, rule.outs, strict=True))
            for dims in (dims for value, dims in tensors if value.name == name and dims is not None):
                self.take(node, rule, row_factor(rule, dims, dim), ends)

    def route(self, node: Node, name: str, ends: Value) -> bool:
        """Send rows where a node looks them up by index, or adds them; whether it does."""
        if node.op not in ROUTED or (at := _index(node)) is None or at.name == name:
            return False
        if node.op == "aten.index.Tensor":
            leaves = name == node.operands[0].name
            way = Strategy((GROUPS if leaves else ROWS, R), (ROWS if leaves else GROUPS,))
        else:
            leaves = name == node.operands[2].name
            base: Placement = ROWS if leaves else GROUPS
            way = Strategy((base, R, GROUPS if leaves else ROWS), (base,))
            if leaves:
                self.make_rows(node.operands[0])
        if self.plan.ways.setdefault(node.name, way) != way:
            raise self.mixed(node, "it looks rows of experts up among rows of experts")
        self.plan.routed[node.name] = ends
        for value, place in (*zip(node.operands, way.ins, strict=True), (node.results[0], way.outs[0])):
            if place == GROUPS:
                self.note(node, value, 0, ends)
            elif place == ROWS and not ROWS.divides(value.tensor.shape[0], self.num_ranks):
                raise self.mixed(node, f"{value.tensor.shape[0]} rows do not divide over the {self.num_ranks} ranks")
        return True

    def make_rows(self, value: Value) -> None:
        """Place what is made of nothing, zeros that rows are added to, where these are."""
        at = self.at.get(value.name)
        rule = self.rules[at] if at is not None else None
        if at is None or rule is None or any(rule.ins) or value.name in self.rows:
            return
        cut = rule.cut(rule.outs[0], ROWS, self.num_ranks)
        if cut is not None and (way := rule.with_cut(self.num_ranks, cut)) is not None:
            self.plan.ways[value.name] = way

    def mixed(self, node: Node, why: str) -> PlacementError:
        where = node.origin.module or "the model"
        return PlacementError(
            f"{node.op} of {where} stands between experts, and {why}: tokens cannot be sent to the ranks of their "
            "experts; leave expert_parallel= out, or multiply by tensor_parallel="
        )


def _is_number(value: Value) -> bool:
    """Whether a value is of whole numbers, as positions and numbers of experts are."""
    return not isinstance(value.type, TensorType) or value.type.dtype.value[0] in "iu"


def _index(node: Node) -> Value | None:
    """The index by which a node looks rows up, or adds them; None where it does otherwise."""
    listed = node.args[1]
    if not isinstance(listed, tuple) or len(listed) != 1 or not isinstance(listed[0], Value):
        return None
    if len(listed[0].tensor.shape) != 1 or len(node.operands) != len(node.args[:1]) + 1 + (
        node.op != "aten.index.Tensor"
    ):
        return None
    if node.op != "aten.index.Tensor" and (len(node.args) < 4 or node.args[3] is not True):
        return None
    return listed[0]


def _after_counts(graph: Graph, routed: Mapping[str, Value]) -> Graph:
    """The graph with what is sent by running counts behind these, and so what reads it.

    Raises:
        PlacementError: the counts depend on it.
    """
    made = {entry.value.name for entry in graph.inputs}
    late: dict[str, None] = {}
    waiting: list[Node] = []
    nodes: list[Node] = []

    def is_ready(node: Node) -> bool:
        needs = [*node.operands, *([routed[node.name]] if node.name in routed else ())]
        return all(v.name in made for v in needs)

    def put(node: Node) -> None:
        nodes.append(node)
        made.update(r.name for r in node.results)

    for node in graph.nodes:
        if is_ready(node):
            put(node)
            while ready := next(filter(is_ready, waiting), None):
                waiting.remove(ready)
                put(ready)
            continue
        if not is_pure(graph, node):
            late[node.op] = None
        waiting.append(node)
    if waiting or late:
        raise PlacementError(
            f"{(waiting[0].op if waiting else next(iter(late)))} stands before the counts of tokens by expert that it "
            "is sent by; count tokens before they are looked up, or leave expert_parallel= out"
        )
    return graph.with_nodes(nodes)


def _check_whole(found: Choices, plan: Plan) -> None:
    """Refuse a value by groups where it is read otherwise. Raises PlacementError."""
    remedy = "tokens cannot be sent to the ranks of their experts; leave expert_parallel= out"
    for node, way in zip(found.graph.nodes, found.strategies, strict=True):
        read = [v.name for v, place in zip(node.operands, way.ins, strict=True) if place is not None]
        if node.name not in plan.ways and any(name in plan.rows for name in read):
            raise PlacementError(
                f"{node.op} of {node.origin.module or 'the model'} reads rows of all experts: {remedy}"
            )
    if any(output.value is not None and output.value.name in plan.rows for output in found.graph.outputs):
        raise PlacementError(f"the model returns rows in the order of experts: {remedy}")
