"""Work of an op: FLOP and bytes of memory, as numbers or as expressions in the symbolic sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from zgraph.ir import OPS, Graph, Node, TensorType, Type
from zgraph.ir.external_ops import SEED, facts
from zgraph.ir.external_ops import Work as FlopRule
from zgraph.ir.ops import views
from zgraph.ir.symbols import Dim


@dataclass(frozen=True, slots=True)
class Work:
    """Work of one rank for one node. `dtype` is the one that its matmuls run in; empty where there are none."""

    flop: Any = 0
    num_bytes: Any = 0
    dtype: str = ""


def work(graph: Graph, node: Node) -> Work:
    """Work of a node of the compute lane. Views, and transfers on other lanes, have none."""
    if node.op in OPS:
        row = OPS[node.op]
        return Work(0, _bytes(node)) if row.is_work and not row.views(node) else Work()
    if node.op == SEED:
        return Work()  # it reads nothing of the tensor whose device it draws on
    flop = _flop(node)
    if flop is None:
        return Work() if views(graph, node) and not graph.foreign[node.op].writes else Work(0, _bytes(node))
    kinds = [v.type for v in node.operands if isinstance(v.type, TensorType) and len(v.type.shape) > 1]
    return Work(flop, _bytes(node), kinds[0].dtype.value if kinds else "f32")


def _bytes(node: Node) -> Any:
    """Bytes read and written, each operand and result once."""
    return sum(_size(v.type) for v in (*node.operands, *node.results))


def _size(kind: Type) -> Any:
    return kind.numel * kind.dtype.itemsize if isinstance(kind, TensorType) else 0


def _flop(node: Node) -> Any:
    """Multiplications and additions of the matmuls in a node; None where there are none."""
    rule = facts(node.op).work
    if rule is None:
        return None
    shapes = [v.type.shape for v in node.operands if isinstance(v.type, TensorType)]
    return _RULES[rule](shapes, node)


Shapes = list[tuple[Dim, ...]]


def _matmul(a: tuple[Dim, ...], b: tuple[Dim, ...]) -> Any:
    """Of [*, m, k] and [*, k, n]."""
    return 2 * math.prod(a) * b[-1]


def _attention(num_matmuls: int) -> Callable[[Shapes, Node], Any]:
    """Attention by this many matmuls of queries by keys: two forward, five backward. A causal kernel does half.

    Operands begin with query [batch, heads, queries, size], key, value; those of a backward with the gradient.
    """

    def rule(shapes: Shapes, node: Node) -> Any:
        query, key = (shapes[1], shapes[2]) if "backward" in node.op else (shapes[0], shapes[1])
        batch, heads, num_queries, size = query
        is_causal = any(a is True for a in (*node.args, *dict(node.kwargs).values()))
        return num_matmuls * (1 if is_causal else 2) * batch * heads * num_queries * key[2] * size

    return rule


def _convolution(shapes: Shapes, node: Node) -> Any:
    out = node.results[0].type
    assert isinstance(out, TensorType)
    return 2 * out.numel * math.prod(shapes[1][1:])


def _convolution_backward(shapes: Shapes, node: Node) -> Any:
    """Twice the forward: to the input, and to the weight. Operands: gradient, input, weight."""
    num_wanted = sum(isinstance(r.type, TensorType) for r in node.results[:2])
    return num_wanted * 2 * math.prod(shapes[0]) * math.prod(shapes[2][1:])


_RULES: Mapping[FlopRule, Callable[[Shapes, Node], Any]] = {
    "product": lambda s, n: _matmul(s[0], s[1]),
    "sum and product": lambda s, n: _matmul(s[1], s[2]),
    "attention": _attention(2),
    "attention backward": _attention(5),
    "convolution": _convolution,
    "convolution backward": _convolution_backward,
    "projected loss": lambda s, n: _matmul(s[0], s[1][::-1]),
    "projected loss backward": lambda s, n: 3 * _matmul(s[1], s[2][::-1]),
}
