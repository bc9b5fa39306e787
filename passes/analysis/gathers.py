"""Gathers of parameters, before they are lowered: from shards to the whole, from the host to the device, or both."""

from __future__ import annotations

from zgraph.ir import Graph, InputKind, Node, Value


def is_gather(graph: Graph, node: Node) -> bool:
    """Whether a node brings a parameter to where it is computed with."""
    return node.op == "reshard" and not node.results[0].tensor.is_on_host and _is_parameter(graph, node.operands[0])


def _is_parameter(graph: Graph, value: Value) -> bool:
    source = _uncast(graph, value).name
    return any(i.value.name == source for i in graph.inputs if i.kind is InputKind.param)


def gathered(graph: Graph, gather: Node) -> str:
    """The parameter that a node gathers, or gathers a cast of."""
    return _uncast(graph, gather.operands[0]).name


def _uncast(graph: Graph, value: Value) -> Value:
    while (maker := graph.producers.get(value.name)) is not None and maker.op == "cast":
        value = maker.operands[0]
    return value
