"""Passes that are wrong in one place, to be found; also what `--load` reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from zgraph.ir import Graph, Node, OutputKind, Phase, Value
from zgraph.passes import Context, Pass
from zgraph.passes.partition import Partition

COMMUTE = frozenset({"aten.add.Tensor", "aten.mul.Tensor"})


@dataclass(frozen=True)
class Wrong(Pass):
    """Swap the operands of sums and products, which is right, and make a mistake in the middle of the graph."""

    mistake: str = "operand"

    name: ClassVar[str] = "wrong"

    def run(self, graph: Graph, context: Context) -> Graph:
        return MISTAKES[self.mistake](graph.with_nodes([commuted(node) for node in graph.nodes]))


def commuted(node: Node) -> Node:
    if node.op not in COMMUTE or len(node.operands) != 2 or node.operands[0].type != node.operands[1].type:
        return node
    return replace(node, args=tuple(reversed(node.args)))


def middle(graph: Graph, wanted: Callable[[Node], bool]) -> int:
    """Where the middle one of some nodes stands."""
    found = [at for at, node in enumerate(graph.nodes) if wanted(node)]
    return found[len(found) // 2]


def changed(graph: Graph, at: int, **fields: object) -> Graph:
    return graph.with_nodes([replace(n, **fields) if i == at else n for i, n in enumerate(graph.nodes)])


def is_scaled(node: Node) -> bool:
    return node.op == "aten.mul.Tensor" and node.args[1] == 0.5


def operand(graph: Graph) -> Graph:
    def has_twins(node: Node) -> bool:
        one, other = (*node.operands, None, None)[:2]
        return node.op not in COMMUTE and one is not None and other is not None and one.type == other.type

    at = middle(graph, has_twins)
    first = graph.nodes[at].args[0]
    return changed(graph, at, args=(first, first, *graph.nodes[at].args[2:]))


def scale(graph: Graph) -> Graph:
    at = middle(graph, is_scaled)
    stands_for = {graph.nodes[at].name: graph.nodes[at].operands[0]}
    return graph.with_nodes([n.substitute(stands_for) for i, n in enumerate(graph.nodes) if i != at])


def constant(graph: Graph) -> Graph:
    at = middle(graph, is_scaled)
    return changed(graph, at, args=(graph.nodes[at].args[0], 0.25))


def order(graph: Graph) -> Graph:
    """Two draws of random numbers change places."""
    draws = [at for at, node in enumerate(graph.nodes) if node.op == "aten.native_dropout.default"]
    first, second = draws[len(draws) // 2 : len(draws) // 2 + 2]
    nodes = list(graph.nodes)
    nodes.insert(second, nodes.pop(first))
    return graph.with_nodes(nodes)


def missing(graph: Graph) -> Graph:
    at = middle(graph, is_scaled)
    return graph.with_nodes([n for i, n in enumerate(graph.nodes) if i != at])


def crash(graph: Graph) -> Graph:
    """As some do where a negation follows a product and a hyperbolic tangent."""
    for node in graph.nodes:
        maker = graph.producers.get(node.operands[0].name) if node.operands else None
        if node.op == "aten.neg.default" and maker is not None and maker.op == "aten.tanh.default":
            first = graph.producers.get(maker.operands[0].name)
            if first is not None and first.op == "aten.mm.default":
                raise LookupError(f"no pattern for %{node.name}")
    return graph


MISTAKES: Mapping[str, Callable[[Graph], Graph]] = {
    "none": lambda graph: graph,
    "operand": operand,
    "scale": scale,
    "constant": constant,
    "order": order,
    "missing": missing,
    "crash": crash,
}


@dataclass(frozen=True)
class WrongPartition(Partition):
    """Partition, but a parameter gets the gradient of another."""

    name: ClassVar[str] = "wrong-partition"

    def run(self, graph: Graph, context: Context) -> Graph:
        after = super().run(graph, context)
        raw = [o.value for o in graph.outputs if o.kind is OutputKind.grad and o.value is not None]
        mine = raw[len(raw) // 2]
        other = next(v for v in raw if v.type == mine.type and v != mine and is_above(graph, v, mine))

        def misread(node: Node) -> Node:
            if node.phase is not Phase.backward or node.op not in ("pending", "copy") or mine.name not in names(node):
                return node
            return node.substitute({mine.name: replace(node.operands[0], name=other.name)})

        wrong = after.with_nodes([misread(node) for node in after.nodes])
        if wrong.nodes != after.nodes:
            return wrong
        outputs = (replace(o, value=other) if o.value == mine else o for o in after.outputs)
        return replace(after, outputs=tuple(outputs))


def names(node: Node) -> list[str]:
    return [v.name for v in node.operands]


def is_above(graph: Graph, value: Value, other: Value) -> bool:
    made = [r.name for n in graph.nodes for r in n.results]
    return made.index(value.name) < made.index(other.name)
