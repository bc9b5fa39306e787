"""The space of a search: where each value may live along an axis, and which strategies each node may take.

A value and its views are one *group*: a view costs nothing, so it is made wherever what it views is. A place of a group
is a *spot*: what is `S2` of `[2, 8, 64]` is `S2` of the view `[2, 8, 4, 16]`, and `S1` once that is transposed. With
the views contracted, choices are left for the other nodes alone.

From cuts of single factors of each node's rule, placements spread to the nodes that read and make the same values,
until none is new. Whole stays what comes of no parameter, since cutting it is free; and what is no float.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from zgraph.ir import Graph, InputKind, Node, Partial, Placement, Replicate, Shard, TensorType, Value
from zgraph.ir.ops import views
from zgraph.ir.rules import Call, Rule, Strategy, rule_of
from zgraph.ir.rules.factors import Cut
from zgraph.passes.analysis.placing import trained_values
from zgraph.passes.placements.twins import instances, twins

__all__ = ["Group", "Space", "whole"]

R, P = Replicate(), Partial("sum")

FEW_BLOCKS = 4
"""Blocks that a value may be cut in, or as many as a batch has rows, if that is more."""

Pair = tuple[str, Placement]
"""A value's name, and where it is."""


@dataclass(frozen=True)
class Group:
    """A value and its views.

    Args:
        root: the value that is no view.
        parents: of each view, in order, the value that it views.
        spots: where each member is at each of the group's places; a member that cannot be there is not among them.
    """

    root: Value
    parents: Mapping[str, str]
    spots: tuple[Mapping[str, Placement], ...]

    @cached_property
    def numbers(self) -> Mapping[Pair, int]:
        """The spot of a member at a placement."""
        return {(name, place): n for n, spot in enumerate(self.spots) for name, place in spot.items()}

    def top(self, spot: int) -> str:
        """The member nearest to the root that can be at a spot."""
        return next(iter(self.spots[spot]))


class Space:
    """All that may be chosen for a graph along an axis.

    Args:
        graph: on whole tensors.
        num_ranks: ranks along the axis.
        fixed: inputs whose placement is given, by name.
        free: whether other parameters may be cut.
        is_sharded: whether data axes shard what is left of parameters, along dim 0: that is not cut in blocks then.

    Attributes:
        trained: names of values that come of parameters.
        made_at: the position of the node that makes each value.
        types: of values that are tensors.
        stands: of each node, the one that stands for it.
        members: of each node that stands for others, the positions of all.
        rules: of each node; None where it has none.
        strategies: of each node that stands for others.
        inputs: the placements that each input may have.
        groups: of values and their views.
        group_of: of each value by name, the number of its group.
    """

    def __init__(
        self, graph: Graph, num_ranks: int, fixed: Mapping[str, Placement], *, free: bool, is_sharded: bool
    ) -> None:
        self.graph, self.num_ranks, self.fixed = graph, num_ranks, fixed
        self.free, self.is_sharded = free, is_sharded
        self.stands = twins(graph)
        self.members = instances(self.stands)
        known: dict[int, Rule | None] = {at: _rule(graph.nodes[at]) for at in self.members}
        self.rules = tuple(known[at] for at in self.stands)
        self.trained = trained_values(graph)
        self.made_at = {r.name: at for at, node in enumerate(graph.nodes) for r in node.results}
        values = (*(i.value for i in graph.inputs), *(r for node in graph.nodes for r in node.results))
        self.types = {v.name: v.type for v in values if isinstance(v.type, TensorType)}
        self.views = {at for at in self.members if self.rules[at] is not None and is_view(graph, graph.nodes[at])}
        self.most_blocks = max([FEW_BLOCKS, *(_rows(i.value) for i in graph.inputs if i.kind is InputKind.input)])
        self.keys = self._value_keys()
        self.known: dict[object, set[Shard]] = {}
        self.barred: dict[object, set[Shard]] = {}
        self._bar_batch()
        for name, place in fixed.items():
            if isinstance(place, Shard):
                self.known.setdefault(self.keys[name], set()).add(place)
        cuts = self._spread()
        self.strategies = {at: self._strategies(at, cuts.get(at, {})) for at in self.members}
        self.inputs = {i.value.name: self._places(i.value, i.kind) for i in graph.inputs}
        self.groups, self.group_of = self._grouped()

    def is_view_at(self, position: int) -> bool:
        """Whether a node is a view of what it reads."""
        return self.stands[position] in self.views

    def _value_keys(self) -> dict[str, object]:
        """Keys of values that repeat each other: results by their node, parameters by what reads them."""
        nodes, users = self.graph.nodes, self.graph.users
        keys: dict[str, object] = {
            r.name: (self.stands[at], n) for at, node in enumerate(nodes) for n, r in enumerate(node.results)
        }
        for entry in self.graph.inputs:
            name = entry.value.name
            readers = [
                (self.stands[at], n)
                for at in users.get(name, ())
                for n, value in enumerate(nodes[at].operands)
                if value.name == name
            ]
            is_param = entry.kind is InputKind.param and readers
            fixed = self.fixed.get(name)
            keys[name] = (entry.value.type, fixed, *readers) if is_param else (entry.kind, name)
        return keys

    def _spread(self) -> dict[int, dict[Cut, None]]:
        """The cuts of each node that stands for others, spread both ways until none is new."""
        around: dict[int, list[tuple[int, object]]] = {}
        for at, positions in self.members.items():
            if self.rules[at] is not None and any(self._is_free(self.graph.nodes[p]) for p in positions):
                sides = [(*self.graph.nodes[p].operands, *self.graph.nodes[p].results) for p in positions]
                found = dict.fromkeys((n, self.keys[v.name]) for values in sides for n, v in enumerate(values))
                around[at] = [*found]
        cuts: dict[int, dict[Cut, None]] = {}
        for at in around:
            rule = self.rules[at]
            assert rule is not None
            cuts[at] = dict.fromkeys((f, (1,)) for f in rule.sizes if rule.allows((f, (1,)), self.num_ranks))
            self._tell(rule, around[at], cuts[at])
        changed = True
        while changed:
            changed = False
            for at in (*around, *reversed(around)):
                changed |= self._spread_at(at, around[at], cuts[at])
        return cuts

    def _spread_at(self, at: int, around: Sequence[tuple[int, object]], cuts: dict[Cut, None]) -> bool:
        """Take the cuts that place a node's values where they are known to be; whether any is new."""
        rule = self.rules[at]
        assert rule is not None
        dims = (*rule.ins, *rule.outs)
        new: dict[Cut, None] = {}
        for n, key in around:
            for place in sorted(self.known.get(key, ()), key=str):
                if (cut := rule.cut(dims[n], place, self.num_ranks)) is not None and cut not in cuts:
                    new[cut] = None
        cuts.update(new)
        self._tell(rule, around, new)
        return bool(new)

    def _tell(self, rule: Rule, around: Sequence[tuple[int, object]], cuts: Iterable[Cut]) -> None:
        """Note where cuts place the values around a node."""
        dims = (*rule.ins, *rule.outs)
        for cut in cuts:
            for n, key in around:
                place = rule.place(dims[n], cut)
                if place is not None and len(place.blocks) <= self.most_blocks and not self._is_barred(key, place):
                    self.known.setdefault(key, set()).add(place)

    def _is_free(self, node: Node) -> bool:
        """Whether it is worth a choice where a node's results are."""
        return any(r.name in self.trained and _is_float(r) for r in node.results)

    def _strategies(self, at: int, cuts: Iterable[Cut]) -> tuple[Strategy, ...]:
        """The ways that a node may go."""
        node, rule = self.graph.nodes[at], self.rules[at]
        if rule is None or not any(self._is_free(self.graph.nodes[p]) for p in self.members[at]):
            return (whole(node) if rule is None else rule.whole,)
        found = rule.strategies(self.num_ranks, cuts)
        return tuple(s for s in found if self._is_usable(node, s))

    def _is_usable(self, node: Node, strategy: Strategy) -> bool:
        """Whether blocks are few, sums are of floats, and no operand has two placements."""
        pairs = {(v.name, p) for v, p in zip(node.operands, strategy.ins, strict=True) if p is not None}
        if len(pairs) > len({name for name, _ in pairs}) or not self._is_worth_summing(node, strategy):
            return False
        places = [*zip(node.operands, strategy.ins, strict=True), *zip(node.results, strategy.outs, strict=True)]
        return all(
            (self._is_allowed(v, p) if isinstance(p, Shard) else p != P or _is_float(v))
            for v, p in places
            if p is not None
        )

    def _is_allowed(self, value: Value, place: Shard) -> bool:
        return len(place.blocks) <= self.most_blocks and not self._is_barred(self.keys[value.name], place)

    def _is_barred(self, key: object, place: Shard) -> bool:
        return place in self.barred.get(key, ())

    def _bar_batch(self) -> None:
        """Bar cuts of the batch's rows: ranks of the axis have the same batch, and the data axes divide it."""
        for entry in self.graph.inputs:
            if entry.kind is InputKind.input and _rows(entry.value) > 1:
                self.barred[self.keys[entry.value.name]] = {Shard(0)}
        for at, node in enumerate(self.graph.nodes):
            rule = self.rules[at]
            if rule is None:
                continue
            values = (*node.operands, *node.results)
            dims = (*rule.ins, *rule.outs)
            places = [(d, p) for d, v in zip(dims, values, strict=True) for p in self.barred.get(self.keys[v.name], ())]
            for cut in dict.fromkeys(rule.cut(d, p, self.num_ranks) for d, p in places):
                for d, v in zip(dims, values, strict=True):
                    if cut is not None and (place := rule.place(d, cut)) is not None:
                        self.barred.setdefault(self.keys[v.name], set()).add(place)

    def _is_worth_summing(self, node: Node, strategy: Strategy) -> bool:
        """Whether a node that works on partial sums adds them, or makes less of them, or is a view.

        Else they are as well reduced before it: the same bytes are sent, and what is reduced can be cut.
        """
        sums = [v for v, p in zip(node.operands, strategy.ins, strict=True) if p == P]
        if not sums or any(isinstance(p, Shard) for p in strategy.ins) or is_view(self.graph, node):
            return True
        made = sum(_num_bytes(v) for v in node.results)
        return len({v.name for v in sums}) > 1 or made < sum(map(_num_bytes, sums))

    def _places(self, value: Value, kind: InputKind) -> tuple[Placement, ...]:
        if value.name in self.fixed:
            return (self.fixed[value.name],)
        if kind is not InputKind.param or not self.free or not isinstance(value.type, TensorType):
            return (R,)
        shape = value.tensor.shape
        known = sorted(self.known.get(self.keys[value.name], ()), key=str)
        return (R, *(p for p in known if p.divides(shape[p.dim], self.num_ranks) and self._is_kept(p)))

    def _is_kept(self, place: Shard) -> bool:
        """Whether a DTensor may be placed so."""
        return len(set(place.blocks)) == 1 and (len(place.blocks) == 1 or place.dim > 0 or not self.is_sharded)

    def _grouped(self) -> tuple[tuple[Group, ...], dict[str, int]]:
        """Values with their views."""
        parents: dict[int, dict[str, str]] = {}
        roots: list[Value] = []
        group_of: dict[str, int] = {}
        joins: list[dict[Pair, list[Pair]]] = []
        for value in (i.value for i in self.graph.inputs):
            _begin(value, roots, joins, group_of)
        for at, node in enumerate(self.graph.nodes):
            if not self.is_view_at(at):
                for value in node.results:
                    _begin(value, roots, joins, group_of)
                continue
            old, new = node.operands[0], node.results[0]
            number = group_of[new.name] = group_of[old.name]
            parents.setdefault(number, {})[new.name] = old.name
            for s in self.strategies[self.stands[at]]:
                if s.ins[0] is not None and s.outs[0] is not None:
                    joins[number].setdefault((old.name, s.ins[0]), []).append((new.name, s.outs[0]))
        met = self._met()
        groups = []
        for number, root in enumerate(roots):
            order = [root.name, *parents.get(number, {})]
            starts = [(name, place) for name in order for place in (R, *sorted(met.get(name, ()), key=str))]
            groups.append(Group(root, parents.get(number, {}), _spots(starts, joins[number])))
        return tuple(groups), group_of

    def _met(self) -> dict[str, set[Placement]]:
        """The placements at which values are made or read, by name; those of views that they are made at among them."""
        found: dict[str, set[Placement]] = {name: set(places) for name, places in self.inputs.items()}
        for at, node in enumerate(self.graph.nodes):
            for s in self.strategies[self.stands[at]]:
                pairs = (*zip(node.operands, s.ins, strict=True), *zip(node.results, s.outs, strict=True))
                for value, place in pairs:
                    if place is not None:
                        found.setdefault(value.name, set()).add(place)
        for output in self.graph.outputs:
            if output.value is not None and output.target in self.graph.param_names:
                found.setdefault(output.value.name, set()).update(self.inputs[output.target])
        return found


def whole(node: Node) -> Strategy:
    """The strategy of a node without a rule: all whole."""
    return Strategy(
        tuple(R if isinstance(v.type, TensorType) else None for v in node.operands),
        tuple(R if isinstance(v.type, TensorType) else None for v in node.results),
    )


def is_view(graph: Graph, node: Node) -> bool:
    """Whether a node gives all elements of its only operand another shape, and nothing else."""
    if len(node.operands) != 1 or len(node.results) != 1 or not views(graph, node):
        return False
    old, new = node.operands[0].type, node.results[0].type
    if not isinstance(old, TensorType) or not isinstance(new, TensorType):
        return False
    return old.dtype is new.dtype and bool(old.numel == new.numel)


def _spots(starts: Sequence[Pair], joins: Mapping[Pair, Sequence[Pair]]) -> tuple[Mapping[str, Placement], ...]:
    """Places of a group: pairs that views lead from one to another."""
    seen: set[Pair] = set()
    found = []
    for start in starts:
        if start in seen:
            continue
        spot: dict[str, Placement] = {}
        todo = [start]
        while todo:
            name, place = todo.pop(0)
            if (name, place) in seen or name in spot:
                continue
            seen.add((name, place))
            spot[name] = place
            todo += joins.get((name, place), ())
        found.append(spot)
    return tuple(found)


def _begin(value: Value, roots: list[Value], joins: list[dict[Pair, list[Pair]]], group_of: dict[str, int]) -> None:
    group_of[value.name] = len(roots)
    roots.append(value)
    joins.append({})


def _num_bytes(value: Value) -> int:
    return int(value.type.numel) * value.type.dtype.itemsize if isinstance(value.type, TensorType) else 0


def _rule(node: Node) -> Rule | None:
    return rule_of(Call.of(node)) if node.op.startswith("aten.") else None


def _is_float(value: Value) -> bool:
    return isinstance(value.type, TensorType) and value.type.dtype.value[0] in "fb" and value.type.dtype.value != "bool"


def _rows(value: Value) -> int:
    """Rows of a batch."""
    shape = value.type.shape if isinstance(value.type, TensorType) else ()
    return shape[0] if len(shape) > 1 and isinstance(shape[0], int) else 1
