"""The difference between two graphs, cut into parts that can be applied one by one.

    before                            after
    %a = aten.neg.default(%x)         %a = aten.neg.default(%x)
    %b = aten.mul.Tensor(%a, %a)      %s = all_gather_start(%w)         hunk 0: + %s, ~ %f
    %f = reshard(%w)                  %f = wait(%s)                     hunk 1: ~ %b
                                      %b = aten.mul.Tensor(%a, %x)

A node is known by what it makes, as in `zgraph.runfile.diff`. Changes belong to one hunk where one of them makes a
value that is in one of the graphs only, or of another type there, and the other reads it.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

from zgraph.ir import Graph, Input, InputKind, Node, Output, Replicate, TensorType, Value, Varying, print_node
from zgraph.ir.arena import sized
from zgraph.ir.lines import unique_names
from zgraph.ir.printer import print_input, print_output
from zgraph.ir.types import Placement, Type
from zgraph.runfile.diff import moved

Item = Node | Input | Output

Entry = TypeVar("Entry", Input, Output)


@dataclass(frozen=True)
class Change:
    """A node, input or output as it was and as it is; None where there is none.

    Args:
        key: what it is known by.
        before: in the first graph.
        after: in the second.
        moved: it is elsewhere among what stayed.
    """

    key: str
    before: Item | None
    after: Item | None
    moved: bool = False

    @property
    def is_output(self) -> bool:
        return isinstance(self.before or self.after, Output)

    @cached_property
    def made(self) -> tuple[Value, ...]:
        """The values that it makes, in either graph."""
        return tuple(v for item in (self.before, self.after) if item is not None for v in _made(item))

    @cached_property
    def read(self) -> frozenset[str]:
        """The names of what it reads, in either graph."""
        return frozenset(v.name for item in (self.before, self.after) if item is not None for v in _read(item))


@dataclass(frozen=True)
class Slot:
    """A place for a node: what stands there with its hunk, what without; `hunk` is None where that is the same."""

    before: Node | None
    after: Node | None
    hunk: int | None = None

    def node(self, chosen: Collection[int]) -> Node | None:
        return self.after if self.hunk is None or self.hunk in chosen else self.before


class Hunks:
    """All that a pass did, in parts.

    Args:
        before: the graph that the pass was given. On another mesh than that of the second graph it is taken as it
            stands there: parameters whole on all ranks.
        after: the graph that it made.
    """

    def __init__(self, before: Graph, after: Graph) -> None:
        self.before, self.after = (before if before.mesh == after.mesh else on_mesh_of(before, after)), after
        old, new = _keyed(self.before.nodes), _keyed(after.nodes)
        strays = set(moved(list(old), list(new)))
        found = [*self._entries(), *_changes(old, new, strays)]
        self.hunks = tuple(tuple(found[at] for at in group) for group in self._groups(found))
        numbers = {c.key: number for number, hunk in enumerate(self.hunks) for c in hunk}
        self._numbers: Mapping[str, int] = numbers
        self._slots = tuple(_slots(old, new, strays, numbers))

    def __len__(self) -> int:
        return len(self.hunks)

    def apply(self, chosen: Collection[int]) -> Graph:
        """The first graph with some of the hunks. It may break rules of the IR: hunks may need each other."""
        if len(chosen) == len(self.hunks):
            return self.after
        if not chosen:
            return self.before
        nodes = [node for slot in self._slots if (node := slot.node(chosen)) is not None]
        inputs = self._picked(_named(self.before.inputs), _named(self.after.inputs), chosen)
        outputs = self._picked(_numbered(self.before.outputs), _numbered(self.after.outputs), chosen)
        foreign = {**self.before.foreign, **self.after.foreign}
        graph = replace(self.after, inputs=inputs, nodes=_in_order(nodes), outputs=outputs, foreign=foreign)
        return sized(_retyped(graph.with_used_ops()))

    def unchosen_outputs(self, chosen: Collection[int]) -> frozenset[int]:
        """Outputs that are still as before the pass: on another mesh than before, each rank's own."""
        return frozenset(
            int(c.key.split()[1])
            for number, hunk in enumerate(self.hunks)
            for c in hunk
            if c.is_output and number not in chosen
        )

    def _picked(self, old: Mapping[str, Entry], new: Mapping[str, Entry], chosen: Collection[int]) -> tuple[Entry, ...]:
        """Inputs or outputs of the second graph where they are chosen or the same, of the first elsewhere."""
        found = []
        for key in {**old, **new}:
            number = self._numbers.get(key)
            source = new if number is None or number in chosen else old
            found += [source[key]] if key in source else []
        return tuple(found)

    def _entries(self) -> Iterator[Change]:
        """Inputs and outputs that differ."""
        for old, new in (
            (_named(self.before.inputs), _named(self.after.inputs)),
            (_numbered(self.before.outputs), _numbered(self.after.outputs)),
        ):
            for key in {**old, **new}:
                if _text(old.get(key)) != _text(new.get(key)):
                    yield Change(key, old.get(key), new.get(key))

    def _groups(self, changes: Sequence[Change]) -> list[list[int]]:
        """Changes that go together, by their positions."""
        makers = [_makers(graph) for graph in (self.before, self.after)]
        parents = list(range(len(changes)))

        def root(at: int) -> int:
            while parents[at] != at:
                parents[at] = parents[parents[at]]
                at = parents[at]
            return at

        of_value: dict[str, list[int]] = {}
        for at, change in enumerate(changes):
            for name in {v.name for v in change.made} | change.read:
                one, other = (m.get(name) for m in makers)
                is_same = one is not None and other is not None and one[1] == other[1]
                if not is_same or (one != other and any(v.name == name for v in change.made)):
                    of_value.setdefault(name, []).append(at)
        for members in of_value.values():
            for at in members[1:]:
                parents[root(at)] = root(members[0])
        groups: dict[int, list[int]] = {}
        for at in range(len(changes)):
            groups.setdefault(root(at), []).append(at)
        return list(groups.values())


def print_hunk(changes: Sequence[Change]) -> list[str]:
    """Lines of a hunk: nodes that it removes (-), adds (+) and moves (>)."""
    found = []
    for change in changes:
        if change.moved and change.before is not None and _text(change.before) == _text(change.after):
            found.append(f"> {_text(change.after)}")
            continue
        found += [f"- {_text(change.before)}"] if change.before is not None else []
        found += [f"+ {_text(change.after)}"] if change.after is not None else []
    return found


def on_mesh_of(graph: Graph, placed: Graph) -> Graph:
    """A graph for one device as it stands on a mesh: parameters whole on every rank, the rest as placed there."""
    count = len(placed.mesh)
    placements = {i.value.name: i.value.type for i in placed.inputs}

    def at(kind: Type, placement: Placement) -> Type:
        return kind.at(*[placement] * count) if isinstance(kind, TensorType) else kind

    inputs = []
    for entry in graph.inputs:
        there = placements.get(entry.value.name)
        varies = isinstance(there, TensorType) and there.varies and entry.kind is not InputKind.param
        kind = at(entry.value.type, Varying() if varies else Replicate())
        inputs.append(replace(entry, value=replace(entry.value, type=kind)))
    known = {i.value.name: i.value for i in inputs}
    nodes = []
    for node in graph.nodes:
        operands = [known[v.name].type for v in node.operands]
        row = graph.foreign.get(node.op)
        varies = (row is not None and row.random) or any(isinstance(k, TensorType) and k.varies for k in operands)
        results = tuple(replace(r, type=at(r.type, Varying() if varies else Replicate())) for r in node.results)
        known.update((r.name, r) for r in results)
        nodes.append(replace(node.substitute(known), results=results))
    outputs = tuple(output.substitute(known) for output in graph.outputs)
    return replace(graph, inputs=tuple(inputs), nodes=tuple(nodes), outputs=outputs, mesh=placed.mesh)


# --- items -------------------------------------------------------------------------------------------------------


def _made(item: Item) -> tuple[Value, ...]:
    return item.results if isinstance(item, Node) else (item.value,) if isinstance(item, Input) else ()


def _read(item: Item) -> tuple[Value, ...]:
    if isinstance(item, Node):
        return item.operands
    return (item.value,) if isinstance(item, Output) and item.value is not None else ()


def _text(item: Item | None) -> str:
    if isinstance(item, Node):
        return print_node(item, origins=False)
    return "" if item is None else print_input(item) if isinstance(item, Input) else print_output(item)


def _named(inputs: Sequence[Input]) -> dict[str, Input]:
    return {f"input {i.value.name}": i for i in inputs}


def _numbered(outputs: Sequence[Output]) -> dict[str, Output]:
    return {f"output {index}": o for index, o in enumerate(outputs)}


def _keyed(nodes: Sequence[Node]) -> Mapping[str, Node]:
    """Every node by what it is known by."""
    keys = (node.name if node.results else _text(node) for node in nodes)
    return dict(zip(unique_names(keys), nodes, strict=True))


def _makers(graph: Graph) -> Mapping[str, tuple[str, Type]]:
    """For each value what makes it, and its type."""
    found = {i.value.name: (f"input {i.value.name}", i.value.type) for i in graph.inputs}
    found.update((r.name, (n.name, r.type)) for n in graph.nodes for r in n.results)
    return found


# --- changes and slots -------------------------------------------------------------------------------------------


def _changes(old: Mapping[str, Node], new: Mapping[str, Node], strays: Collection[str]) -> Iterator[Change]:
    """Nodes that differ, in the order of the second graph."""
    yield from (Change(key, node, None) for key, node in old.items() if key not in new)
    for key, node in new.items():
        if key in strays or key not in old or _text(old[key]) != _text(node):
            yield Change(key, old.get(key), node, key in strays)


def _slots(
    old: Mapping[str, Node], new: Mapping[str, Node], strays: Collection[str], numbers: Mapping[str, int]
) -> Iterator[Slot]:
    """The places of all nodes of both graphs, in an order that is the order of each."""
    stayed = [key for key in new if key in old and key not in strays]
    before, after = iter(old.items()), iter(new.items())
    for anchor in [*stayed, None]:
        for key, node in before:
            if key == anchor:
                break
            yield Slot(node, None, numbers[key])
        for key, node in after:
            if key == anchor:
                yield Slot(old[key], node, numbers.get(key))
                break
            yield Slot(None, node, numbers[key])


def _in_order(nodes: Sequence[Node]) -> tuple[Node, ...]:
    """The nodes by phase, each behind what it reads, and otherwise as they stand."""
    maker = {r.name: at for at, node in enumerate(nodes) for r in node.results}
    needs = [{maker[v.name] for v in node.operands if v.name in maker} - {at} for at, node in enumerate(nodes)]
    dependents: list[list[int]] = [[] for _ in nodes]
    missing = [len(before) for before in needs]
    for at, before in enumerate(needs):
        for other in before:
            dependents[other].append(at)
    ready = [(nodes[at].phase.rank, at) for at, count in enumerate(missing) if not count]
    heapq.heapify(ready)
    found = []
    while ready:
        _, at = heapq.heappop(ready)
        found.append(nodes[at])
        for other in dependents[at]:
            missing[other] -= 1
            if not missing[other]:
                heapq.heappush(ready, (nodes[other].phase.rank, other))
    return tuple(found)


def _retyped(graph: Graph) -> Graph:
    """The graph with every value read as what it was made."""
    known = {i.value.name: i.value for i in graph.inputs}
    nodes = []
    for node in graph.nodes:
        if any(known.get(v.name, v).type != v.type for v in node.operands):
            node = node.substitute(known)
        nodes.append(node)
        known.update((r.name, r) for r in node.results)
    outputs = tuple(output.substitute(known) for output in graph.outputs)
    return replace(graph, nodes=tuple(nodes), outputs=outputs)
