"""Makes nodes with fresh names and the result types that the ops table gives."""

from __future__ import annotations

from collections.abc import Iterable

from zgraph.ir.graph import Arg, Graph, Node, Origin, Phase, Value
from zgraph.ir.ops import OPS
from zgraph.ir.types import Type


class Builder:
    """Makes nodes for a graph without ever using a name twice.

    Args:
        graph: whose names are taken, and whose mesh the type rules go by.
        made_by: the pass, noted in the origin of every node made.
    """

    def __init__(self, graph: Graph, made_by: str = "") -> None:
        self._names = {i.value.name for i in graph.inputs} | set(graph.producers)
        self.mesh = graph.mesh
        self._made_by = made_by

    def fresh(self, stem: str) -> str:
        """A name that begins with `stem` and is not taken."""
        name, count = stem, 1
        while name in self._names:
            count += 1
            name = f"{stem}_{count}"
        self._names.add(name)
        return name

    def value(self, stem: str, kind: Type) -> Value:
        return Value(self.fresh(stem), kind)

    def node(
        self, op: str, args: Iterable[Arg], stem: str, phase: Phase, origin: Origin | None = None, **options: Arg
    ) -> Node:
        """A node of one of zgraph's own ops, with the results that its type rule gives, named after `stem`."""
        node = Node(op, tuple(args), (), tuple(options.items()), phase, self.origin(origin))
        return Node(
            op,
            node.args,
            tuple(self.value(stem, t) for t in OPS[op].rule(node, self.mesh)),
            node.kwargs,
            phase,
            node.origin,
        )

    def typed(
        self,
        op: str,
        args: Iterable[Arg],
        results: Iterable[Value],
        phase: Phase,
        origin: Origin | None = None,
        **options: Arg,
    ) -> Node:
        """A node whose results the caller made: for ops whose operands alone do not say what they give."""
        return Node(op, tuple(args), tuple(results), tuple(options.items()), phase, self.origin(origin))

    def origin(self, origin: Origin | None) -> Origin:
        """`origin` with this builder's pass as its maker."""
        found = origin or Origin()
        return Origin(found.module, found.file, found.line, self._made_by)
