"""Gathers of parameters, before they are lowered: from shards to the whole, from the host to the device, or both."""

from __future__ import annotations

from zgraph.ir import Graph, Node

CASTS = ("cast", "float8_cast")
"""Ops between a parameter and its gather."""


def is_gather(graph: Graph, node: Node) -> bool:
    """Whether a node brings a parameter to where it is computed with."""
    if node.op != "reshard" or node.results[0].tensor.is_on_host:
        return False
    return gathered(graph, node) in graph.param_names


def gathered(graph: Graph, gather: Node) -> str:
    """The parameter that a node gathers, or gathers a cast of."""
    casts = casts_before(graph, gather)
    return graph.producers[casts[-1]].operands[0].name if casts else gather.operands[0].name


def casts_before(graph: Graph, gather: Node) -> list[str]:
    """The casts between the parameter and its gather, last first."""
    found: list[str] = []
    value = gather.operands[0]
    while (maker := graph.producers.get(value.name)) is not None and maker.op in CASTS:
        found.append(maker.name)
        value = maker.operands[0]
    return found
