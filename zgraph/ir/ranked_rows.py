"""Rows of ops that know which part of a dim their rank has; of attention whose keys and values go round, its bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from zgraph.ir.axis_rules import axis_of
from zgraph.ir.graph import Node
from zgraph.ir.layout import concrete
from zgraph.ir.op_rows import Op
from zgraph.ir.ranked_types import DOCS, OPAQUE, ranked
from zgraph.ir.rules.ring import RING
from zgraph.ir.type_rules import tensor
from zgraph.ir.types import Mesh

__all__ = ["RANKED", "ROUNDS"]


def _is_backward(node: Node) -> bool:
    return node.op.endswith("_backward")


def _visiting(node: Node) -> tuple[int, int]:
    """Bytes of a rank's keys and values, and numbers in them."""
    first = 2 if _is_backward(node) else 1
    kinds = [tensor(node, first), tensor(node, first + 1)]
    counts = [math.prod(map(concrete, kind.shape)) for kind in kinds]
    return sum(n * kind.dtype.itemsize for n, kind in zip(counts, kinds, strict=True)), sum(counts)


def _round_sends(node: Node, mesh: Mesh) -> int:
    """Keys and values to the next rank at each step but the last; their gradients, in fp32 at least, at each."""
    (num_bytes, count), (_, size) = _visiting(node), axis_of(node, mesh)
    wide = max(tensor(node).dtype.itemsize, 4)
    return (size - 1) * num_bytes + (size * count * wide if _is_backward(node) else 0)


def _round_lands(node: Node, mesh: Mesh) -> int:
    """Room for keys and values that are here, and that come; for what is made of them, and of all before, in fp32."""
    num_bytes, count = _visiting(node)
    wide = max(tensor(node).dtype.itemsize, 4)
    queries = math.prod(map(concrete, tensor(node).shape))
    return 2 * num_bytes + 2 * wide * queries + (3 * wide * count if _is_backward(node) else 0)


ROUNDS: Mapping[str, tuple[Callable[[Node, Mesh], int], Callable[[Node, Mesh], int]]] = dict.fromkeys(
    RING.values(), (_round_sends, _round_lands)
)
"""Bytes that an op's rank sends, and that it takes for itself."""


def _no_bytes(node: Node, mesh: Mesh) -> int:
    return 0


def _row(name: str, doc: str) -> Op:
    sends, lands = ROUNDS.get(name, (_no_bytes, _no_bytes))
    is_pure = name not in OPAQUE
    return Op(name, doc, ranked, "compute", sends, lands, pure=is_pure, recomputable=is_pure, is_work=True)


RANKED = tuple(_row(name, doc) for name, doc in DOCS.items())
"""The rows."""
