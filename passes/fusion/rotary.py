"""Several ops as one: rotary embeddings, in the forward and in the backward.

    fwd %a = aten.mul.Tensor(%q, %cos)
    fwd %l = aten.slice.Tensor(%q, 3, 0, 64)
    fwd %h = aten.slice.Tensor(%q, 3, 64, 9223372036854775807)
    fwd %n = aten.neg.default(%h)
    fwd %r = aten.cat.default([%n, %l], -1)
    fwd %b = aten.mul.Tensor(%r, %sin)
    fwd %y = aten.add.Tensor(%a, %b)    ->    fwd %y = zgraph.rotary.default(%q, %cos, %sin, [0, 2, 1, 3], false)

Each rewrite is text (`_LINES`): the op that stands there afterwards, a colon, and the ops that are matched; lines that
begin with blanks go on. A name is bound to a value or a number, and stands for the same everywhere. `last`
is the last dimension, `half` half of its size, `end` its size or more, and `_` anything. `order` is the one of the
dimensions in memory for which the last result lies as it lay before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

from zgraph.ir import Arg, Builder, ExternalOp, Graph, Node, TensorType, Value
from zgraph.ir.external_ops import ROTARY
from zgraph.ir.layout import dense_strides, is_contiguous
from zgraph.ir.symbols import Dim
from zgraph.passes.analysis.rows import FLOATS
from zgraph.passes.analysis.subgraphs import Call, Found, Subgraph, find, parse_calls

_LINES = """
y = zgraph.rotary.default(x, cos, sin, order, false):
    a = aten.mul.Tensor(x, cos); l = aten.slice.Tensor(x, last, 0, half); h = aten.slice.Tensor(x, last, half, end);
    n = aten.neg.default(h); r = aten.cat.default([n, l], last); b = aten.mul.Tensor(r, sin); y = aten.add.Tensor(a, b)
y = zgraph.rotary.default(g, cos, sin, order, true):
    u = aten.mul.Tensor(g, sin); l = aten.slice.Tensor(u, last, 0, half); h = aten.slice.Tensor(u, last, half, end);
    n = aten.neg.default(l); p = aten.slice_backward.default(n, _, last, half, end, 1);
    q = aten.slice_backward.default(h, _, last, 0, half, 1); r = aten.add.Tensor(p, q); w = aten.mul.Tensor(g, cos);
    y = aten.add.Tensor(r, w)
y = zgraph.rotary.default(g, cos, sin, order, true):
    u = aten.mul.Tensor(g, sin); l = aten.slice.Tensor(u, last, 0, half); h = aten.slice.Tensor(u, last, half, end);
    n = aten.neg.default(l); p = aten.slice_backward.default(n, _, last, half, end, 1);
    q = aten.slice_backward.default(h, _, last, 0, half, 1); w = aten.mul.Tensor(g, cos); r = aten.add.Tensor(w, p);
    y = aten.add.Tensor(r, q)
y = zgraph.rotary.default(x, cos, sin, order, back):
    l = aten.slice.Tensor(x, last, 0, d); h = aten.slice.Tensor(x, last, d, end);
    r = zgraph.rotary.default(l, cos, sin, _, back); y = aten.cat.default([r, h], last)
y = zgraph.rotary.default(g, cos, sin, order, back):
    l = aten.slice.Tensor(g, last, 0, d); h = aten.slice.Tensor(g, last, d, end);
    r = zgraph.rotary.default(l, cos, sin, _, back); p = aten.slice_backward.default(h, _, last, d, end, 1);
    q = aten.slice_backward.default(r, _, last, 0, d, 1); y = aten.add.Tensor(p, q)
r = zgraph.rotary.default(x, cos, sin, order, back); y = aten.transpose.int(r, 1, 2):
    r = zgraph.rotary.default(x, cos, sin, _, back); t = aten.transpose.int(r, 1, 2); y = aten.clone.default(t)
"""


@dataclass(frozen=True)
class Rewrite:
    """A subgraph, and the calls that stand in its place; what they make is called as what it is in the subgraph."""

    subgraph: Subgraph
    becomes: tuple[Call, ...]


def _rewrite(line: str) -> Rewrite:
    becomes, matched = map(parse_calls, line.split(": "))
    return Rewrite(Subgraph(matched), becomes)


REWRITES = tuple(map(_rewrite, re.sub(r"\n +", " ", _LINES.strip()).splitlines()))
"""In the order in which they are tried: later ones match what earlier ones made."""


def fused_subgraphs(graph: Graph, made_by: str) -> Graph:
    """The graph with each such subgraph as what it becomes."""
    builder = Builder(graph, made_by)
    for rewrite in REWRITES:
        graph = _rewritten(graph, rewrite, builder)
    return graph


def _rewritten(graph: Graph, rewrite: Rewrite, builder: Builder) -> Graph:
    position = {node.name: number for number, node in enumerate(graph.nodes)}
    instead: dict[str, tuple[Node, ...]] = {}
    for root in graph.nodes:
        if root.op != rewrite.subgraph.root.op:
            continue
        found = find(rewrite.subgraph, root, graph, position)
        if found is None or any(n.name in instead for n in found.nodes):
            continue
        if made := _made(rewrite, found, builder):
            instead |= dict.fromkeys((n.name for n in found.nodes), ())
            instead[root.name] = made
    if not instead:
        return graph
    nodes = [new for node in graph.nodes for new in instead.get(node.name, (node,))]
    return replace(graph, nodes=tuple(nodes), foreign={**graph.foreign, ROTARY: ExternalOp()})


def _made(rewrite: Rewrite, found: Found, builder: Builder) -> tuple[Node, ...]:
    """The nodes that replace a subgraph; empty if no order of dimensions gives the root the type that it had."""
    root = found.nodes[-1]
    last = len(root.results[0].tensor.shape) - 1
    for order in permutations(range(last)):
        nodes = tuple(_called(rewrite, found, (*order, last), builder))
        if nodes and nodes[-1].name == root.name and _lies_as(nodes[-1].results[0].tensor, root.results[0].tensor):
            return *nodes[:-1], replace(nodes[-1], results=root.results)
    return ()


def _called(rewrite: Rewrite, found: Found, order: tuple[int, ...], builder: Builder) -> Iterator[Node]:
    """The new calls, up to the first that does not fit what it is called with."""
    root = found.nodes[-1]
    origin = builder.origin(next((n.origin for n in reversed(found.nodes) if n.origin.module), root.origin))
    bound: dict[str, Arg] = {**found.bound, "order": order}
    for call in rewrite.becomes:
        args = tuple(bound[a] if a in bound else _literal(a) for a in call.args if isinstance(a, str))
        kind, named = _TYPES[call.op](*args), found.bound[call.result]
        if kind is None or not isinstance(named, Value):
            return
        bound[call.result] = made = Value(named.name, kind)
        yield Node(call.op, args, (made,), (), root.phase, origin, root.checkpoint)


def _literal(text: str) -> Arg:
    return text == "true" if text in ("true", "false") else int(text)


def _lies_as(made: TensorType, wanted: TensorType) -> bool:
    """Whether two types are the same; where a dim of one element ends in memory says nothing."""
    steps = zip(made.shape, _strides(made), _strides(wanted), strict=True)
    is_like = (made.dtype, made.shape) == (wanted.dtype, wanted.shape)
    return is_like and all(size == 1 or a == b for size, a, b in steps)


def _strides(kind: TensorType) -> tuple[Dim, ...]:
    return dense_strides(kind.shape) if kind.strides is None else kind.strides


def _laid_out(kind: TensorType, shape: tuple[Dim, ...], strides: tuple[Dim, ...]) -> TensorType:
    return replace(kind, shape=shape, strides=None if is_contiguous(shape, strides) else strides)


def _rotary_type(x: Arg, cos: Arg, sin: Arg, order: Sequence[int], back: Arg) -> TensorType | None:
    """Of x [A, B, C, D], and cosines and sines that have its sizes or one, and as many columns or fewer."""
    kinds = [v.type for v in (x, cos, sin) if isinstance(v, Value)]
    tensors = [k for k in kinds if isinstance(k, TensorType) and k.dtype in FLOATS and len(k.shape) == 4]
    if len(tensors) < 3 or any(_strides(k)[-1] != 1 for k in tensors):
        return None
    turned, angle, other = (k.shape for k in tensors)
    has_angles = angle == other and all(a in (1, d) for a, d in zip(angle[:-1], turned[:-1], strict=True))
    columns, longer = angle[-1], turned[-1]
    if not has_angles or not isinstance(columns, int) or not isinstance(longer, int) or columns > longer:
        return None
    return _laid_out(tensors[0], turned, dense_strides(turned, order))


def _transposed_type(x: Arg, first: int, second: int) -> TensorType | None:
    if not isinstance(x, Value):
        return None
    dims = list(range(len(x.tensor.shape)))
    dims[first], dims[second] = second, first
    shape, strides = x.tensor.shape, _strides(x.tensor)
    return _laid_out(x.tensor, tuple(shape[d] for d in dims), tuple(strides[d] for d in dims))


_TYPES: Mapping[str, Callable[..., TensorType | None]] = {
    ROTARY: _rotary_type,
    "aten.transpose.int": _transposed_type,
}
"""Result type of each op that replaces others, as a function of its arguments; None where they do not fit the op."""
