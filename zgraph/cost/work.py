"""Work of an op: FLOP and bytes of memory, as numbers or as expressions in the symbolic sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from zgraph.cost.functions import called_work, is_higher_order
from zgraph.ir import OPS, DType, Graph, Node, TensorType, Type
from zgraph.ir.axis_rules import axis_of
from zgraph.ir.codecs import Sized
from zgraph.ir.coded_rules import codec_of
from zgraph.ir.external_ops import SEED, facts
from zgraph.ir.external_ops import Work as FlopRule
from zgraph.ir.ops import views
from zgraph.ir.rules import meant
from zgraph.ir.rules.ring import RING
from zgraph.ir.symbols import Dim


@dataclass(frozen=True, slots=True)
class Work:
    """Work of one rank for one node.

    Args:
        flop: of its matmuls.
        num_bytes: read and written.
        dtype: of its matmuls; empty where there are none.
        size: the smallest size of a matmul, or the number of keys of an attention; 0 where it is not known.
    """

    flop: Any = 0
    num_bytes: Any = 0
    dtype: str = ""
    size: Any = 0


def work(graph: Graph, node: Node) -> Work:
    """Work of a node of the compute lane. Views, and transfers on other lanes, have none."""
    if node.op in OPS:
        row, whole = OPS[node.op], meant(node)
        if whole is not node and (flop := _flop(whole)) is not None:  # of rows by groups, a rank has its share
            size = axis_of(node, graph.mesh)[1]
            flop = flop * size if node.op in RING.values() else flop // size  # to the keys of every rank in turn
            return Work(flop, _bytes(node), _matmul_dtype(whole), _smallest(whole))
        if node.op in ("encode", "decode"):
            return Work(0, _coding_bytes(graph, node))
        return Work(0, _bytes(node)) if row.is_work and not row.views(node) else Work()
    if node.op == SEED:
        return Work()  # it reads nothing of the tensor whose device it draws on
    if is_higher_order(node):
        flop, num_bytes = called_work(node, _pair)
        return Work(flop, _bytes(node) + num_bytes, _matmul_dtype(node))
    flop = _flop(node)
    if flop is None:
        return Work() if views(graph, node) and not graph.foreign[node.op].writes else Work(0, _bytes(node))
    return Work(flop, _bytes(node), _matmul_dtype(node), _smallest(node))


def attention_kernel(node: Node) -> str:
    """The kernel of an attention op: "flash", "cudnn", "efficient", "flex"; empty where it is none."""
    if is_higher_order(node):
        return "flex" if "attention" in node.op else ""
    rule = facts(node.op).work
    if rule is None or not rule.startswith("attention"):
        return ""
    return next((name for name in ("cudnn", "efficient") if name in node.op), "flash")


def _smallest(node: Node) -> Any:
    """The smallest size of a matmul; the number of keys of an attention."""
    shapes = [v.type.shape for v in node.operands if isinstance(v.type, TensorType)]
    if attention_kernel(node):
        key = _query_and_key(shapes, node)[1]
        return key[2] if "by tokens" not in str(facts(node.op).work) else key[-3]
    if facts(node.op).work == "scaled product":
        shapes = shapes[::2]  # a scale is behind each matrix
    wide = [shape for shape in shapes if len(shape) > 1]
    sizes = [size for shape in wide[:2] for size in shape[-2:]]
    return min(sizes) if sizes and all(isinstance(size, int) for size in sizes) else 0


def _pair(graph: Graph, node: Node) -> tuple[Any, Any]:
    done = work(graph, node)
    return done.flop, done.num_bytes


def _matmul_dtype(node: Node) -> str:
    kinds = [v.type for v in node.operands if isinstance(v.type, TensorType) and len(v.type.shape) > 1]
    return kinds[0].dtype.value if kinds else "f32"


def _bytes(node: Node) -> Any:
    """Bytes read and written, each operand and result once."""
    return sum(_size(v.type) for v in (*node.operands, *node.results))


def _coding_bytes(graph: Graph, node: Node) -> Any:
    """Bytes that a rank reads and writes to code its numbers, or to make numbers of codes.

    Numbers and codes once, as often as a codec takes. Beside them rests are read and written; of what changed, a code
    reads the copy before and writes the numbers for the next one, and what it stands for is added to the copy before.
    """
    codec, is_encoded = codec_of(node), node.op == "encode"
    if codec.is_exact:
        return codec.passes * _bytes(node)
    numbers, codes = (node.operands[0], node.results[0]) if is_encoded else (node.results[0], node.operands[0])
    numel, itemsize = _own(numbers.tensor, graph), numbers.tensor.dtype.itemsize
    coded = _own(codes.tensor, graph)
    if isinstance(codec, Sized):  # the type has room for the most
        coded = codec.expected_bytes(numel)
    found = (codec.passes if is_encoded else 1) * (itemsize * numel + coded)
    if node.option("copies") is not None:
        found += (1 + is_encoded) * itemsize * numel
    if is_encoded and node.option("feedback") is not None:
        found += 2 * DType.f32.itemsize * numel
    return found


def _own(kind: TensorType, graph: Graph) -> Any:
    """Elements of a tensor that a rank has."""
    return kind.numel // graph.num_shards if kind.is_sharded else kind.numel


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


def _products(shapes: Shapes, node: Node) -> Any:
    """Of the first half of the operands with the second, one by one."""
    half = len(shapes) // 2
    return sum(_matmul(a, b) for a, b in zip(shapes[:half], shapes[half:], strict=True))


def _grouped(shapes: Shapes, node: Node) -> Any:
    """Of matrices whose rows, columns or inner dim belong to one group each: [t, k] and [g, k, n]; [g, m, k] and
    [k, t], of which each column belongs to one; [m, t] and [t, n]; or one for each group.
    """
    a, b = shapes[:2]
    return _matmul(a[1:] if len(a) > len(b) else a, b)


def _packed(shapes: Shapes, node: Node) -> Any:
    """Of rows with a matrix that is packed in some way: its columns are those of the result."""
    return 2 * math.prod(shapes[0]) * _result(node)[-1]


def _vector(shapes: Shapes, node: Node) -> Any:
    """Of a matrix, or a vector, with the vector behind it."""
    return 2 * math.prod(shapes[-2])


def _result(node: Node) -> tuple[Dim, ...]:
    kind = node.results[0].type
    assert isinstance(kind, TensorType)
    return kind.shape


def _attention(num_matmuls: int) -> Callable[[Shapes, Node], Any]:
    """Attention by this many matmuls of queries by keys: two forward, five backward. A causal kernel does half.

    Operands begin with query [batch, heads, queries, size], key, value; those of a backward with the gradient.
    """

    def rule(shapes: Shapes, node: Node) -> Any:
        query, key = _query_and_key(shapes, node)
        batch, heads, num_queries, size = query
        return num_matmuls * _share(node) * batch * heads * num_queries * key[2] * size

    return rule


def _attention_by_tokens(num_matmuls: int) -> Callable[[Shapes, Node], Any]:
    """The same with query [batch, queries, heads, size], or [queries, heads, size] of all sequences together: there
    `max_k` says how many keys each query has at most.
    """

    def rule(shapes: Shapes, node: Node) -> Any:
        query, key = _query_and_key(shapes, node)
        numbers = _numbers(node)
        num_keys = key[1] if len(key) == 4 else numbers[1] if len(numbers) > 1 else key[0]
        return num_matmuls * _share(node) * math.prod(query) * num_keys

    return rule


def _query_and_key(shapes: Shapes, node: Node) -> tuple[tuple[Dim, ...], tuple[Dim, ...]]:
    return (shapes[1], shapes[2]) if "backward" in node.op else (shapes[0], shapes[1])


def _share(node: Node) -> int:
    """Operations for each multiplication of a matmul: two, or half of them where a kernel is causal."""
    return 1 if _is_causal(node) else 2


def _is_causal(node: Node) -> bool:
    name = node.op.split(".")[1]
    if name.startswith("_efficient_attention"):
        return _numbers(node)[-1:] in ([1], [2])  # the kind of mask
    truths = [a for a in node.args if isinstance(a, bool)]
    if name in _WITH_LOGSUMEXP:
        truths = truths[1:]
    return dict(node.kwargs).get("is_causal") is True or truths[:1] == [True]


_WITH_LOGSUMEXP = {
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_cudnn_attention_forward",
}
"""Those whose first truth says whether the logarithm of sums is wanted; the next is `is_causal`."""


def _numbers(node: Node) -> list[int]:
    return [a for a in node.args if isinstance(a, int) and not isinstance(a, bool)]


def _convolution(shapes: Shapes, node: Node) -> Any:
    """Each number of the result, or of the input where it is transposed, by the filter."""
    return 2 * math.prod(shapes[0] if _is_transposed(node) else _result(node)) * math.prod(shapes[1][1:])


def _convolution_backward(shapes: Shapes, node: Node) -> Any:
    """Twice the forward: to the input, and to the weight. Operands: gradient, input, weight."""
    num_wanted = sum(isinstance(r.type, TensorType) for r in node.results[:2])
    return num_wanted * 2 * math.prod(shapes[1 if _is_transposed(node) else 0]) * math.prod(shapes[2][1:])


def _is_transposed(node: Node) -> bool:
    """The argument of that name is the first that is a truth, in those that have it."""
    found = next((a for a in node.args if isinstance(a, bool)), False)
    return found and node.op.split(".")[1] in _TRANSPOSABLE


_TRANSPOSABLE = {"convolution", "_convolution", "convolution_overrideable", "convolution_backward"}


_RULES: Mapping[FlopRule, Callable[[Shapes, Node], Any]] = {
    "product": lambda s, n: _matmul(s[0], s[1]),
    "scaled product": lambda s, n: _matmul(s[0], s[2]),
    "sum and product": lambda s, n: _matmul(s[1], s[2]),
    "products": _products,
    "grouped product": _grouped,
    "packed product": _packed,
    "vector product": _vector,
    "attention": _attention(2),
    "attention backward": _attention(5),
    "attention by tokens": _attention_by_tokens(2),
    "attention by tokens backward": _attention_by_tokens(5),
    "convolution": _convolution,
    "convolution backward": _convolution_backward,
    "projected loss": lambda s, n: _matmul(s[0], s[1][::-1]),
    "projected loss backward": lambda s, n: 3 * _matmul(s[1], s[2][::-1]),
    "distillation": lambda s, n: 2 * _matmul(s[0], s[1][::-1]) + 2 * _matmul(s[2], s[3][::-1]),
    "projected losses backward": lambda s, n: 3 * _matmul(s[2], s[3][::-1]),
    "distillation backward": lambda s, n: 3 * _matmul(s[2], s[3][::-1]) + _matmul(s[4], s[5][::-1]),
}
