"""Search of where things live along one axis: the program solved, and read as choices that `place` carries out.

A solution says how each node goes. How each group of values then comes to where it is read is written out here:
straight from where it is made, or as a part of the whole where the whole is there, whichever takes less.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from zgraph.errors import PlacementError
from zgraph.ir import Axis, Graph, OutputKind, Placement, Replicate, TensorType, Value, num_data_ranks
from zgraph.ir.rules import Strategy
from zgraph.ir.symbols import simplify
from zgraph.passes.analysis.placing import Choices
from zgraph.passes.core.base import Context
from zgraph.passes.placements.prices import Prices
from zgraph.passes.placements.program import Program, Solved
from zgraph.passes.placements.space import Group, Pair, Space

__all__ = ["Alternative", "Found", "Search"]

R = Replicate()


@dataclass(frozen=True)
class Alternative:
    """Another placement of a parameter, with the best that goes with it.

    Args:
        place: the placement.
        more_us: what the step takes more, in microseconds.
    """

    place: Placement
    more_us: float


@dataclass(frozen=True)
class Found:
    """Result of a search.

    Args:
        places: the placement of each parameter, by the name of its value.
        choices: of all nodes, for `place`.
        total_us: time of a step and of AdamW's update, nothing hidden behind anything else.
        bound_us: what no placement goes below, by the relaxation of the program; blocks that repeat being placed alike.
        sent_bytes: bytes that a rank sends along the axis in a step.
    """

    places: Mapping[str, Placement]
    choices: Choices
    total_us: float
    bound_us: float
    sent_bytes: int

    @property
    def gap(self) -> float:
        """How far the time is above its lower bound, as a share of that."""
        return max(self.total_us / self.bound_us - 1, 0.0) if self.bound_us else 0.0


def _symbolic(graph: Graph) -> Iterator[Value]:
    """Values with a size that is a symbol."""
    for value in (*(i.value for i in graph.inputs), *(r for node in graph.nodes for r in node.results)):
        if isinstance(value.type, TensorType) and not all(isinstance(simplify(d), int) for d in value.type.shape):
            yield value


class Search:
    """A search of one graph along one axis.

    Args:
        graph: on whole tensors.
        axis: the axis, and how many ranks lie along it.
        context: the hardware, and the data axes.
        fixed: the placement of parameters that is given, by the names of their values.
        free: whether other parameters may be cut; else they are whole.

    Raises:
        PlacementError: the graph is placed along an axis already, or has sizes that are symbols.
    """

    def __init__(
        self, graph: Graph, axis: Axis, context: Context, fixed: Mapping[str, Placement], *, free: bool = True
    ) -> None:
        if graph.mesh:
            raise PlacementError(
                f"a search along {axis.name} begins with whole tensors, and the graph is placed along "
                f"{', '.join(a.name for a in graph.mesh)}: search along the first axis, and state the others"
            )
        if (value := next(_symbolic(graph), None)) is not None:
            raise PlacementError(
                f"a search compares times, which needs sizes that are numbers, and %{value.name} is {value.type}: "
                "capture the model with static sizes (dynamic=False, or lengths=, which pads inputs), or state where "
                "parameters are"
            )
        data = num_data_ranks(context.mesh)
        self.space = Space(graph, axis.size, fixed, free=free, is_sharded=data > 1)
        self.prices = Prices(graph, axis, context)
        self.program = Program(self.space, self.prices)

    @cached_property
    def solved(self) -> Solved:
        """The solution."""
        return self.program.solve()

    @cached_property
    def found(self) -> Found:
        """The solution, written out. Raises PlacementError if there is none."""
        return self.read(self.solved)

    def alternatives(self, name: str) -> tuple[Alternative, ...]:
        """The other placements that a parameter may have, the cheapest first.

        Args:
            name: of the parameter's value.
        """
        own = self.solved.choices[name]
        found = []
        for place in self.space.inputs[self.program.own[name]]:
            if place != own:
                solved = self.program.solve(given=(name, place))
                found.append(Alternative(place, max(self.read(solved).total_us - self.found.total_us, 0.0)))
        return tuple(sorted(found, key=lambda a: a.more_us))

    def read(self, solved: Solved) -> Found:
        """A solution, written out."""
        graph, space = self.space.graph, self.space
        strategies = tuple(self._strategy(solved, at) for at in range(len(graph.nodes)))
        needed = self._needed(solved, strategies)
        ways: dict[Pair, Pair] = {}
        total_us, sent = 0.0, 0
        for number, group in enumerate(space.groups):
            if not isinstance(group.root.type, TensorType):
                continue
            us, num_bytes = self._bring(group, self._made(solved, strategies, group), needed[number], ways)
            total_us, sent = total_us + us, sent + num_bytes
        for at, node in enumerate(graph.nodes):
            if not space.is_view_at(at):
                total_us += self.program.node_us(node, space.stands[at], strategies[at])
        places: dict[str, Placement] = {}
        for entry in graph.params:
            place = solved.choices[entry.value.name]
            assert not isinstance(place, Strategy)
            places[entry.value.name] = place
            if entry.value.name in space.trained:
                total_us += self.prices.at_rest_us(entry, place)
        views = frozenset(node.results[0].name for at, node in enumerate(graph.nodes) if space.is_view_at(at))
        choices = Choices(graph, strategies, space.rules, {}, views, ways)
        return Found(places, choices, total_us, solved.bound_us, sent)

    def _strategy(self, solved: Solved, at: int) -> Strategy:
        """Choice of a node; of a view, that it is whole, which nobody asks for."""
        if self.space.is_view_at(at):
            return self.space.strategies[self.space.stands[at]][0]
        found = solved.choices[self.space.stands[at]]
        assert isinstance(found, Strategy)
        return found

    def _needed(self, solved: Solved, strategies: tuple[Strategy, ...]) -> list[dict[int, None]]:
        """The spots at which each group is read."""
        space = self.space
        needed: list[dict[int, None]] = [{} for _ in space.groups]

        def reads(name: str, place: Placement) -> None:
            number = space.group_of[name]
            needed[number][space.groups[number].numbers[name, place]] = None

        for at, node in enumerate(space.graph.nodes):
            if not space.is_view_at(at):
                for value, place in zip(node.operands, strategies[at].ins, strict=True):
                    if place is not None:
                        reads(value.name, place)
        for output in space.graph.outputs:
            if output.value is None or not isinstance(output.value.type, TensorType):
                continue
            is_grad = output.kind is OutputKind.grad and output.target in space.graph.param_names
            wanted = solved.choices[output.target] if is_grad else R
            assert not isinstance(wanted, Strategy)
            reads(output.value.name, wanted)
        return needed

    def _made(self, solved: Solved, strategies: tuple[Strategy, ...], group: Group) -> int:
        """The spot at which a group is made."""
        name = group.root.name
        if name in self.space.made_at:
            at = self.space.made_at[name]
            results = self.space.graph.nodes[at].results
            place = strategies[at].outs[next(i for i, r in enumerate(results) if r.name == name)]
        else:
            found = solved.choices[name]
            assert not isinstance(found, Strategy)
            place = found
        return group.numbers[name, place or R]

    def _bring(self, group: Group, made: int, needed: Mapping[int, None], ways: dict[Pair, Pair]) -> tuple[float, int]:
        """Note how a group comes to where it is read; the time and the bytes that it takes."""
        whole = group.numbers[group.root.name, R]
        straight = self._sources(group, made, needed, whole if whole in needed else made)
        through = self._sources(group, made, {**needed, whole: None}, whole)
        sources = min((straight, through), key=lambda found: self._us(group, found))
        sent = 0
        for new, old in sources.items():
            top = group.top(new)
            if old != new:
                ways[top, group.spots[new][top]] = (top, group.spots[old][top])
                kind = self.space.types[top]
                sent += self.prices.sent_bytes(kind, group.spots[old][top], group.spots[new][top])
        for spot in {made: None, **sources}:
            for name, place in group.spots[spot].items():
                parent = group.parents.get(name)
                if parent is not None and parent in group.spots[spot]:
                    ways[name, place] = (parent, group.spots[spot][parent])
        return self._us(group, sources), sent

    def _sources(self, group: Group, made: int, needed: Mapping[int, None], whole: int) -> dict[int, int]:
        """From which spot a group is brought to each: from where it is made, or from the whole."""
        found = {}
        for spot in needed:
            options = [made, *([whole] if spot != whole else [])]
            found[spot] = spot if spot == made else min(options, key=lambda old: self._moved(group, old, spot))
        return found

    def _us(self, group: Group, sources: Mapping[int, int]) -> float:
        return sum(self._moved(group, old, new) for new, old in sources.items())

    def _moved(self, group: Group, old: int, new: int) -> float:
        return 0.0 if old == new else self.program.reshard_us(group, old, new)
