"""One generic topological sort. A scheduling policy is nothing but a priority for it."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from zgraph.ir import OPS, Graph, Node
from zgraph.ir.aliases import Memory
from zgraph.ir.graph import values_in

Priority = Callable[[int, Node], float]


def dependencies(graph: Graph) -> list[set[int]]:
    """For each node, the positions of the nodes that must run before it.

    Beside data: a write comes after every earlier reader of that memory and before every later one; random and
    opaque ops keep their order; a release comes after every user of the memory it frees. What is sent is read until
    it is waited for.
    """
    memory = Memory(graph)
    producer = {r.name: position for position, node in enumerate(graph.nodes) for r in node.results}
    readers: dict[str, set[int]] = {}
    writer: dict[str, int] = {}
    sent: dict[str, set[str]] = {}
    chained: int | None = None
    needs: list[set[int]] = []
    for position, node in enumerate(graph.nodes):
        before = {producer[v.name] for v in node.operands if v.name in producer}
        touched = {root for v in node.operands for root in memory.roots(v.name)}
        touched |= {root for v in node.operands for root in sent.get(v.name, ())}
        if node.op in OPS and OPS[node.op].lane != "compute":
            sent.update((r.name, touched) for r in node.results)
        before |= {writer[root] for root in touched if root in writer}
        for root in _written(graph, memory, node):
            before |= readers.get(root, set())
            writer[root] = position
        foreign = graph.foreign.get(node.op)
        if foreign and (foreign.random or foreign.opaque):
            if chained is not None:
                before.add(chained)
            chained = position
        for root in touched:
            readers.setdefault(root, set()).add(position)
        before.discard(position)
        needs.append(before)
    return needs


def _written(graph: Graph, memory: Memory, node: Node) -> set[str]:
    """The storages that a node writes to, or frees."""
    if node.op in OPS:
        arguments = node.args if OPS[node.op].consumes else ()
    else:
        arguments = tuple(node.args[i] for i in graph.foreign[node.op].writes)
    return {root for value in values_in(arguments) for root in memory.roots(value.name)}


def reorder(graph: Graph, priority: Priority) -> Graph:
    """The nodes in the order of `priority` (lowest first) as far as their dependencies and phases allow.

    Ties keep the order that the nodes had.
    """
    needs = dependencies(graph)
    dependents: list[list[int]] = [[] for _ in graph.nodes]
    missing = [len(before) for before in needs]
    for position, before in enumerate(needs):
        for other in before:
            dependents[other].append(position)

    def key(position: int) -> tuple[int, float, int]:
        node = graph.nodes[position]
        return node.phase.rank, priority(position, node), position

    ready = [key(p) for p, count in enumerate(missing) if count == 0]
    heapq.heapify(ready)
    order: list[Node] = []
    while ready:
        position = heapq.heappop(ready)[2]
        order.append(graph.nodes[position])
        for other in dependents[position]:
            missing[other] -= 1
            if missing[other] == 0:
                heapq.heappush(ready, key(other))
    return graph.with_nodes(order)
