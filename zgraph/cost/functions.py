"""Work and memory of higher-order ops, by the functions that they call.

Of a branch the larger side counts, where sizes are numbers; of a loop one turn, as nobody knows how many there will be;
of a scan each row. Attention by functions is counted dense, which is the most that a block mask leaves of it, and its
memory is that of torch's own dense kernel: matrices of scores, and what the functions make of all scores at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from zgraph.ir import HIGHER_ORDER, Arg, DType, Graph, Node, TensorType, Type, Value
from zgraph.ir.graph import graphs_in, values_in
from zgraph.ir.ops import views

MATRICES = {"flex_attention": 4, "flex_attention_backward": 8}
"""Matrices of scores that torch 2.13's dense kernels hold at once, read off what its allocator is asked for."""

_SCANS = ("scan", "map_impl", "associative_scan")

Size = Callable[[Type], Any]


def is_higher_order(node: Node) -> bool:
    """Whether an op calls functions."""
    return node.op.startswith(f"{HIGHER_ORDER}.")


def called_work(node: Node, work_of: Callable[[Graph, Node], tuple[Any, Any]]) -> tuple[Any, Any]:
    """FLOP and bytes of the functions that a node calls, or of attention by them; `work_of` gives those of an op."""
    name = _name(node)
    if name in MATRICES:
        return _attention(node), 0
    found = [[work_of(graph, inner) for inner in graph.nodes] for graph in _functions(node)]
    sums = [tuple(sum(column) for column in zip((0, 0), *ops, strict=True)) for ops in found]
    flop, num_bytes = ([one[i] for one in sums] for i in (0, 1))
    if name == "cond":
        return _larger(flop), _larger(num_bytes)
    times = _num_rows(node) if name in _SCANS else 1
    return times * sum(flop), times * sum(num_bytes)


def called_bytes(node: Node, size: Size, taken: Callable[[Node], int]) -> int:
    """Bytes that a node's functions take beside its operands and results, at most.

    Args:
        node: it calls functions.
        size: bytes of a value by its type.
        taken: bytes that an op in a function takes beside its operands and results.
    """
    name = _name(node)
    if name in MATRICES:
        steps = sum(_peak(graph, lambda kind: 1, lambda inner: 0) for graph in _functions(node))
        return (MATRICES[name] + steps) * int(size(_scores(node)))
    totals = [_peak(graph, size, taken) for graph in _functions(node)]
    if name == "cond":
        return int(max(totals, default=0))
    carried = sum(size(v.type) for v in node.results)
    return int(sum(totals) + carried)


def _peak(graph: Graph, size: Size, taken: Callable[[Node], int]) -> int:
    """Bytes of what a function has made and still needs, at most. What has views is needed to the end."""
    viewed = {name for node in graph.nodes for name in views(graph, node)} | graph.output_names
    held, live, most = dict[str, int](), 0, 0
    for position, node in enumerate(graph.nodes):
        if not views(graph, node):
            held.update((r.name, int(size(r.type))) for r in node.results)
            live += sum(held[r.name] for r in node.results)
        most = max(most, live + taken(node))
        for name in {v.name for v in (*node.operands, *node.results)} & held.keys() - viewed:
            if graph.users.get(name, (position,))[-1] == position:
                live -= held.pop(name)
    return most


def _name(node: Node) -> str:
    return node.op.split(".")[1]


def _functions(node: Node) -> list[Graph]:
    return list(graphs_in(node.args))


def _larger(sizes: Sequence[Any]) -> Any:
    """The largest size; where some are symbols, the sum, which is no less."""
    return max(sizes, default=0) if all(isinstance(size, int) for size in sizes) else sum(sizes)


def _num_rows(node: Node) -> Any:
    """How often a scan calls its function: the size of the first dimension of what it goes over."""
    over: Arg = node.args[2 if _name(node) == "scan" else 1]
    kinds = [v.type for v in values_in(over) if isinstance(v.type, TensorType) and v.type.shape]
    return kinds[0].shape[0] if kinds else 1


def _attention(node: Node) -> Any:
    """Forward: scores, and what they weigh. Backward: scores again, and the gradients of weights, value, query, key."""
    *rows, num_keys = _scores(node).shape
    size, value_size = _operand(node, 1).shape[-1], _operand(node, 2).shape[-1]
    sizes = size + value_size if _name(node) == "flex_attention" else 3 * size + 2 * value_size
    return 2 * math.prod(rows) * num_keys * sizes


def _scores(node: Node) -> TensorType:
    """Scores [batch, heads, queries, keys], in fp32 unless the query is of fp64."""
    query, key = _operand(node, 0), _operand(node, 1)
    dtype = query.dtype if query.dtype is DType.f64 else DType.f32
    return TensorType(dtype, (*query.shape[:3], key.shape[2]))


def _operand(node: Node, index: int) -> TensorType:
    found = node.args[index]
    assert isinstance(found, Value)
    return found.tensor
