"""The search as an integer program, solved by HiGHS (Huangfu and Hall, "Parallelizing the dual revised simplex", 2018).

Variables, all between 0 and 1:

    x[i, s]        node i takes strategy s, or input i has placement s: integers, of which one is 1
    f[g, r, q, p]  group g is made at its spot q, and read by r at spot p: the product of two choices
    e[g, q, p]     g is brought from q to p, which is paid once for all that read it

    sum over p of f[g, r, q, p]  =  sum of x that make g at q
    sum over q of f[g, r, q, p]  =  sum of x of r that read g at p
    f[g, r, q, p]  <=  e[g, q, p]  +  (the least of e[g, q, whole] and of what takes the part p of the whole)

With x chosen, the rest is linear and comes out whole. The flows f make the relaxation tight, its bound near
the optimum. Nodes of repeated blocks share their variables, and so do groups that are made and read alike.

The choice of a strategy for each node with prices on edges is that of Alpa (Zheng et al., "Alpa: Automating Inter- and
Intra-Operator Parallelism", 2022); views are contracted and reshards shared here.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from math import inf

import numpy as np

from zgraph.errors import PlacementError
from zgraph.ir import Node, OutputKind, Placement, Replicate, TensorType
from zgraph.ir.rules import Strategy
from zgraph.passes.placements.prices import Prices
from zgraph.passes.placements.space import Group, Space

__all__ = ["Choice", "Program", "Solved"]

R = Replicate()

MAX_NODES = 2_000
"""Nodes of the branch and bound: a number, unlike a time, is the same on all ranks."""

GAP = 1e-4
"""Share of the lower bound within which a solution is taken for the best."""

Reads = dict[Hashable, dict[int, list[int]]]
"""For each reader of a group, the variables by which it reads it at each spot."""

Choice = Strategy | Placement
"""Choice of a node, or of an input."""


@dataclass(frozen=True)
class Solved:
    """A solution.

    Args:
        choices: of each node by the position of the one that stands for it, and of each input by its name.
        total_us: what it takes by the program.
        bound_us: what no solution of the program goes below.
    """

    choices: Mapping[int | str, Choice]
    total_us: float
    bound_us: float


@dataclass
class Program:
    """The program of a space.

    Args:
        space: what may be chosen.
        prices: what it takes.
    """

    space: Space
    prices: Prices
    costs: list[float] = field(default_factory=list)
    integral: list[bool] = field(default_factory=list)
    rows: list[tuple[dict[int, float], float, float]] = field(default_factory=list)
    chosen: dict[int | str, dict[Choice, int]] = field(default_factory=dict)
    own: dict[str, str] = field(default_factory=dict)
    times: dict[tuple[int, Strategy], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._choose_inputs()
        self._choose_strategies()
        self._bring()

    def solve(self, given: tuple[str, Placement] | None = None) -> Solved:
        """The best solution.

        Args:
            given: an input, by its name, and the placement that it is to have.

        Raises:
            PlacementError: nothing goes.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import coo_matrix

        least = np.zeros(len(self.costs))
        if given is not None:
            least[self.chosen[self.own[given[0]]][given[1]]] = 1.0
        entries = [(v, r, c) for r, (row, _, _) in enumerate(self.rows) for c, v in row.items()]
        values, at, columns = zip(*entries, strict=True)
        matrix = coo_matrix((values, (at, columns)), (len(self.rows), len(self.costs))).tocsr()
        scale = 1.0 / max(max(self.costs), 1e-9)
        found = milp(
            np.array(self.costs) * scale,
            integrality=np.array(self.integral, dtype=int),
            bounds=Bounds(least, 1.0),
            constraints=LinearConstraint(matrix, [low for _, low, _ in self.rows], [high for _, _, high in self.rows]),
            options={"mip_rel_gap": GAP, "node_limit": MAX_NODES},
        )
        if found.x is None:
            raise PlacementError(f"no placement of the parameters was found: {found.message}; leave placements= out")
        choices = {of: _largest(found.x, options) for of, options in self.chosen.items()}
        choices |= {name: choices[key] for name, key in self.own.items()}
        bound = found.mip_dual_bound if found.mip_dual_bound is not None else found.fun
        return Solved(choices, float(found.fun) / scale, max(float(bound) / scale, 0.0))

    def _variable(self, price: float, *, is_integer: bool = False) -> int:
        self.costs.append(price)
        self.integral.append(is_integer)
        return len(self.costs) - 1

    def _row(self, row: Mapping[int, float], low: float, high: float) -> None:
        self.rows.append((dict(row), low, high))

    def _choose_inputs(self) -> None:
        """A placement for each input; parameters of repeated blocks share theirs."""
        by_key: dict[Hashable, str] = {}
        for entry in self.space.graph.inputs:
            name = entry.value.name
            first = self.own[name] = by_key.setdefault(self.space.keys[name], name)
            options = self.chosen.setdefault(first, {})
            for place in self.space.inputs[first]:
                price = self.prices.at_rest_us(entry, place) if entry.target and name in self.space.trained else 0.0
                if place in options:
                    self.costs[options[place]] += price
                else:
                    options[place] = self._variable(price, is_integer=True)
        for options in self.chosen.values():
            self._row(dict.fromkeys(options.values(), 1.0), 1.0, 1.0)

    def _choose_strategies(self) -> None:
        for at, positions in self.space.members.items():
            if at in self.space.views:
                continue
            node = self.space.graph.nodes[at]
            self.chosen[at] = {
                s: self._variable(len(positions) * self.node_us(node, at, s), is_integer=True)
                for s in self.space.strategies[at]
            }
            self._row(dict.fromkeys(self.chosen[at].values(), 1.0), 1.0, 1.0)

    def _bring(self) -> None:
        """Nodes that bring groups to where they are read; of groups that are alike, once."""
        makers = self._makers()
        readers = self._readers()
        known: dict[Hashable, dict[int, float]] = {}
        for number, reads in readers.items():
            group = self.space.groups[number]
            made = makers[number]
            look = self._look(group, made, reads)
            if look in known:
                for variable, price in known[look].items():
                    self.costs[variable] += price
            else:
                known[look] = self._bring_group(group, made, reads)

    def _makers(self) -> list[dict[int, list[int]]]:
        """For each group, the variables that make it at each of its spots."""
        space = self.space
        found: list[dict[int, list[int]]] = [{} for _ in space.groups]
        for entry in space.graph.inputs:
            number = space.group_of[entry.value.name]
            for own, x in self.chosen[self.own[entry.value.name]].items():
                assert not isinstance(own, Strategy)
                found[number].setdefault(space.groups[number].numbers[entry.value.name, own], []).append(x)
        for at, node in enumerate(space.graph.nodes):
            for s, x in self.chosen.get(space.stands[at], {}).items():
                for value, place in zip(node.results, s.outs, strict=True) if isinstance(s, Strategy) else ():
                    if place is not None:
                        number = space.group_of[value.name]
                        found[number].setdefault(space.groups[number].numbers[value.name, place], []).append(x)
        return found

    def _readers(self) -> dict[int, Reads]:
        """Readers of each group: for each reader, the variables by which it does at each spot; none of an output."""
        space = self.space
        found: dict[int, Reads] = {}

        def reads(name: str, place: Placement, reader: Hashable, variables: Iterable[int]) -> None:
            number = space.group_of[name]
            spot = space.groups[number].numbers[name, place]
            found.setdefault(number, {}).setdefault(reader, {}).setdefault(spot, []).extend(variables)

        for at, node in enumerate(space.graph.nodes):
            for s, x in self.chosen.get(space.stands[at], {}).items():
                assert isinstance(s, Strategy)
                operands = {v.name: (n, p) for n, (v, p) in enumerate(zip(node.operands, s.ins, strict=True))}
                for name, (n, place) in operands.items():
                    if place is not None:
                        reads(name, place, (space.stands[at], n), [x])
        for output in space.graph.outputs:
            if output.value is None or not isinstance(output.value.type, TensorType):
                continue
            if output.kind is OutputKind.grad and output.target in space.graph.param_names:
                owner = self.own[output.target]
                for own, x in self.chosen[owner].items():
                    assert not isinstance(own, Strategy)
                    reads(output.value.name, own, owner, [x])
            else:
                reads(output.value.name, R, "output", ())
        return found

    def _look(self, group: Group, made: Mapping[int, list[int]], reads: Reads) -> Hashable:
        """Key that groups have in common which share variables: who makes and reads them, and where they may be."""
        order = {name: n for n, name in enumerate((group.root.name, *group.parents))}
        spots = tuple(tuple((order[name], place) for name, place in spot.items()) for spot in group.spots)
        makers = tuple((spot, tuple(xs)) for spot, xs in made.items())
        readers = tuple((who, tuple((spot, tuple(xs)) for spot, xs in at.items())) for who, at in reads.items())
        return group.root.type, spots, makers, readers

    def _bring_group(self, group: Group, made: Mapping[int, list[int]], reads: Reads) -> dict[int, float]:
        """The variables and rows of one group. Returns the variables that have a price, with it."""
        flows = {reader: self._flows(group, made, at) for reader, at in reads.items()}
        whole = group.numbers[group.root.name, R]
        if len(reads) == 1:
            (flow,) = flows.values()
            priced = {}
            for (old, new), variable in flow.items():
                price = self._alone_us(group, old, new, whole)
                priced[variable] = self.costs[variable] = price
                if price == inf:
                    self._forbid(variable)
            return {variable: price for variable, price in priced.items() if price < inf}
        return self._shared(group, flows, whole)

    def _flows(
        self, group: Group, made: Mapping[int, list[int]], at: Mapping[int, list[int]]
    ) -> dict[tuple[int, int], int]:
        """Variables that say from which spot to which a reader's value comes: the product of two choices."""
        found = {(old, new): self._variable(0.0) for old in made for new in at}
        for old, makers in made.items():
            self._row({**dict.fromkeys(makers, -1.0), **{found[old, new]: 1.0 for new in at}}, 0.0, 0.0)
        for new, readers in at.items():
            if readers:
                self._row({**dict.fromkeys(readers, -1.0), **{found[old, new]: 1.0 for old in made}}, 0.0, 0.0)
        return found

    def _shared(
        self, group: Group, flows: Mapping[Hashable, Mapping[tuple[int, int], int]], whole: int
    ) -> dict[int, float]:
        """Ways that several readers share: each way is paid once, and parts of a whole that is there are free."""
        priced: dict[int, float] = {}

        def way(price: float) -> int:
            variable = self._variable(price)
            priced[variable] = price
            return variable

        pairs = dict.fromkeys(pair for flow in flows.values() for pair in flow)
        to_whole = {
            old: way(self.reshard_us(group, old, whole))
            for old in dict.fromkeys(old for old, _ in pairs)
            if old != whole
        }
        parts = {
            new: way(self.reshard_us(group, whole, new))
            for new in dict.fromkeys(new for _, new in pairs)
            if new != whole and self.reshard_us(group, whole, new) < inf
        }
        for old, new in pairs:
            if old == new:
                continue
            direct = self.reshard_us(group, old, new)
            straight = to_whole[old] if new == whole else way(direct) if direct < inf else None
            for flow in flows.values():
                if (used := flow.get((old, new))) is None:
                    continue
                through = None
                if old != whole != new and new in parts:
                    through = self._variable(0.0)
                    self._row({through: 1.0, to_whole[old]: -1.0}, -inf, 0.0)
                    self._row({through: 1.0, parts[new]: -1.0}, -inf, 0.0)
                limits = {v: -1.0 for v in (straight, through) if v is not None}
                self._row({used: 1.0, **limits}, -inf, 0.0)
        return priced

    def _alone_us(self, group: Group, old: int, new: int, whole: int) -> float:
        """Time to bring a group to its only reader."""
        through = self.reshard_us(group, old, whole) + self.reshard_us(group, whole, new) if old != new else inf
        return min(self.reshard_us(group, old, new), through)

    def _forbid(self, variable: int) -> None:
        self.costs[variable] = 0.0
        self._row({variable: 1.0}, 0.0, 0.0)

    def reshard_us(self, group: Group, old: int, new: int) -> float:
        """Time to bring a group from one spot to another, at the member that is nearest to the root of those that can
        be there; infinite if that cannot be where it is."""
        name = group.top(new)
        if old == new:
            return 0.0
        before = group.spots[old].get(name)
        return inf if before is None else self.prices.moved_us(self.space.types[name], before, group.spots[new][name])

    def node_us(self, node: Node, at: int, strategy: Strategy) -> float:
        """Time of a node that goes one way; `at` is the position of the one that stands for it."""
        if (at, strategy) not in self.times:
            self.times[at, strategy] = self.prices.node_us(node, strategy)
        return self.times[at, strategy]


def _largest(x: np.ndarray, options: Mapping[Choice, int]) -> Choice:
    return max(options, key=lambda choice: float(x[options[choice]]))
