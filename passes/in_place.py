"""Write an input's new value where the old one is, if nothing else reads that.

    buffer %keys: f32[2, 4, 64, 8] "keys"
    fwd %new: f32[2, 4, 64, 8] = aten.index_put.default(%keys, [%rows, none, %places], %k)
    return fwd mutation "keys" %new
                    |
                    v
    fwd %new: f32[2, 4, 64, 8] = aten.index_put_.default(%keys, [%rows, none, %places], %k)

Without it, each step would copy all of a cache to add one row to it. A value is written in place if it is the new value
of the input that its op reads first, and no node that comes later, nor an output, reads the memory as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from zgraph.ir import ExternalOp, Graph, Node, OutputKind
from zgraph.ir.aliases import Memory
from zgraph.passes.core.base import Context, Pass

WRITING: Mapping[str, str] = {
    "aten.index_put.default": "aten.index_put_.default",
    "aten.index_copy.default": "aten.index_copy_.default",
}
"""The op that writes into its first operand, by the op that makes a new value of it."""

_ROW = ExternalOp(views=(0,), writes=(0,))


@dataclass(frozen=True)
class InPlace(Pass):
    """Write an input's new value where the old one is, if nothing else reads that."""

    name: ClassVar[str] = "in-place"

    def run(self, graph: Graph, context: Context) -> Graph:
        new_values = {o.value.name: o.target for o in graph.outputs if o.kind is OutputKind.mutation and o.value}
        last, memory = _last_reads(graph)
        returned = memory.roots(*graph.output_names) if graph.outputs else frozenset()
        nodes: list[Node] = []
        for position, node in enumerate(graph.nodes):
            old = new_values.get(node.name)
            if old is not None and node.op in WRITING and node.operands[0].name == old:
                others = memory.roots(*(v.name for v in node.operands[1:]))
                is_read = last[old] > position or old in returned or old in others
                if not is_read and node.operands[0].type == node.results[0].type:
                    node = replace(node, op=WRITING[node.op])
            nodes.append(node)
        used = {node.op: _ROW for node in nodes if node.op in WRITING.values()}
        return replace(graph, nodes=tuple(nodes), foreign={**graph.foreign, **used}).with_used_ops()


def _last_reads(graph: Graph) -> tuple[dict[str, int], Memory]:
    """The position of the last node that reads each storage."""
    memory, last = Memory(graph), dict[str, int]()
    for position, node in enumerate(graph.nodes):
        for value in node.operands:
            last.update(dict.fromkeys(memory.roots(value.name), position))
    return last, memory
