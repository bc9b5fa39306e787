"""Gathers of parameters, before they are lowered: from shards to the whole, from the host to the device, or both."""

from __future__ import annotations

from zgraph.ir import Graph, Node, Value


def is_gather(graph: Graph, node: Node) -> bool:
    """Whether a node brings a parameter to where it is computed with."""
    if node.op != "reshard" or node.results[0].tensor.is_on_host:
        return False
    return gathered(graph, node) in graph.param_names


def gathered(graph: Graph, gather: Node) -> str:
    """The parameter that a node gathers, or gathers a cast of."""
    return _uncast(graph, gather.operands[0]).name


def _uncast(graph: Graph, value: Value) -> Value:
    while (maker := graph.producers.get(value.name)) is not None and maker.op == "cast":
        value = maker.operands[0]
    return value
