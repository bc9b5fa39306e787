"""Gathers of parameters, before they are lowered."""

from __future__ import annotations

from zgraph.ir import Graph, Node


def is_gather(node: Node) -> bool:
    """Whether a node is a reshard from shards to the whole."""
    return node.op == "reshard" and node.operands[0].tensor.is_sharded


def gathered(graph: Graph, gather: Node) -> str:
    """The parameter that a node gathers, or gathers a cast of."""
    value = gather.operands[0]
    while (maker := graph.producers.get(value.name)) is not None and maker.op == "cast":
        value = maker.operands[0]
    return value.name
