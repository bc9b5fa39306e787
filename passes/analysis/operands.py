"""The matrices that products read, looked at through their transposes."""

from __future__ import annotations

from dataclasses import dataclass

from zgraph.ir import Graph, Value
from zgraph.ir.external_ops import facts

TRANSPOSE = "aten.t.default"


@dataclass(frozen=True)
class Operand:
    """A matrix of a product: a value, perhaps transposed."""

    value: Value
    is_turned: bool

    @property
    def shape(self) -> tuple[object, ...]:
        """The matrix's sizes, as the product reads it."""
        shape = self.value.tensor.shape
        return shape[::-1] if self.is_turned else shape


def operand_of(graph: Graph, value: Value) -> Operand:
    """The matrix that a value is, or is the transpose of."""
    turned = False
    while (node := graph.producers.get(value.name)) is not None and len(node.operands) == 1:
        if node.op == TRANSPOSE:
            turned = not turned
        elif facts(node.op).elements != "itself":
            break
        value = node.operands[0]
    return Operand(value, turned)
