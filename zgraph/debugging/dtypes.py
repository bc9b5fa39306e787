"""A graph with all its floating-point numbers of one dtype, to be run on simulated ranks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from zgraph.debugging.draws import FLOATS, SAME_DRAWS
from zgraph.ir import OPS, Arg, DType, ExternalOp, Graph, Node, TensorType
from zgraph.ir.coded_rules import outer_numel
from zgraph.ir.external_ops import CAST, FLOAT8, FLOAT8_MM
from zgraph.ir.graph import Value
from zgraph.ir.symbols import Dim
from zgraph.ir.types import Type

_WIDE: Mapping[DType, DType] = {DType.f32: DType.c64, DType.f64: DType.c128}
_COMPLEX = frozenset(_WIDE.values())
_AMAX, _ONES, _MM = "aten.amax.default", "aten.ones_like.default", "aten.mm.default"
CODING = frozenset({"encode", "decode"})
"""Ops that name a codec."""
_KERNEL_OPERAND = re.compile(rf"\b(?:{'|'.join(d.value for d in FLOATS)})\[")


def in_dtype(graph: Graph, dtype: DType, *, draws_in_own: bool = False) -> Graph:
    """The graph with all its floating-point numbers of one dtype: to be run, not always valid.

    Buckets are laid out anew, since members are aligned to bytes. A product in float8 is the one that it approximates:
    scales are 1, and nothing is rounded. Codes are those of `raw`: they stand for the numbers themselves.

    Args:
        graph: after any pass.
        dtype: f64 or f32.
        draws_in_own: random numbers are drawn in the dtype that the graph says, so that they are the graph's own.
    """
    return _Rewriter(graph, dtype, draws_in_own).run()


def exactly_coded(graph: Graph) -> Graph:
    """The graph whose codes are those of `raw`: they stand for the numbers themselves, in the dtypes that they have."""
    if all(node.op not in CODING for node in graph.nodes):
        return graph
    env, nodes = dict[str, Value](), list[Node]()
    for node in graph.nodes:
        made = node.substitute(env)
        if any(v.name in env for v in node.operands) or node.op in CODING:
            made = replace(made, kwargs=_raw(made))
            kinds = OPS[node.op].rule(made, graph.mesh)
            made = replace(made, results=tuple(Value(r.name, k) for r, k in zip(node.results, kinds, strict=True)))
            env.update((r.name, r) for r, old in zip(made.results, node.results, strict=True) if r != old)
        nodes.append(made)
    return graph.with_nodes(nodes)


def _raw(node: Node) -> tuple[tuple[str, Arg], ...]:
    """Options of a node with `raw` in the place of its codec; a gather of codes names none then."""
    if node.option("codec") is None:
        return node.kwargs
    if node.op not in CODING:
        return tuple((k, a) for k, a in node.kwargs if k not in ("codec", "dtype"))
    return tuple((k, "raw" if k == "codec" else a) for k, a in node.kwargs)


class _Rewriter:
    def __init__(self, graph: Graph, dtype: DType, draws_in_own: bool) -> None:
        self.graph, self.dtype, self.draws_in_own = graph, dtype, draws_in_own
        self.made: dict[str, Type] = {}
        self.scaled: set[str] = set()
        self.coded: dict[str, tuple[Dim, ...]] = {}

    def run(self) -> Graph:
        graph = self.graph
        inputs = tuple(replace(i, value=self.value(i.value), master=None) for i in graph.inputs)
        nodes = tuple(made for node in graph.nodes for made in self.nodes(node))
        outputs = tuple(replace(o, value=None if o.value is None else self.value(o.value)) for o in graph.outputs)
        foreign = {name: ExternalOp() for name in (CAST, _AMAX, _ONES, _MM)} | dict(graph.foreign)
        return replace(graph, inputs=inputs, nodes=nodes, outputs=outputs, foreign=foreign)

    def nodes(self, node: Node) -> Iterator[Node]:
        row = self.graph.foreign.get(node.op)
        if self.draws_in_own and row is not None and row.random and node.op not in SAME_DRAWS:
            yield from self.drawing(node)
        elif node.op == FLOAT8:
            yield from self.unscaled(node)
        elif node.op == "float8_scale":
            yield replace(node, args=tuple(map(self.value, node.operands)), results=self.values(node))
        elif node.op == "float8_cast":
            self.scaled.add(node.name)
            yield _cast(self.value(node.operands[0]), self.value(node.results[0]), node)
        elif node.op == FLOAT8_MM:
            a, _, b, *_ = node.operands
            yield self.node(replace(node, op=_MM, args=(a, b)))
        else:
            yield self.node(node)

    def unscaled(self, node: Node) -> Iterator[Node]:
        """A matrix as it is, and scales of 1 in the shape of those that it was cast with."""
        (x, _, dim), (data, scale) = node.args, node.results
        assert isinstance(x, Value)
        self.scaled.add(data.name)
        data, scale, largest = self.value(data), self.value(scale), Value(f"{node.name}.largest", self.type(scale.type))
        yield _cast(self.value(x), data, node)
        yield replace(
            node, op=_AMAX, args=(self.value(x), () if dim is None else (dim,), dim is not None), results=(largest,)
        )
        yield replace(node, op=_ONES, args=(largest,), results=(scale,))

    def drawing(self, node: Node) -> Iterator[Node]:
        """A node that draws, between casts to the dtypes that it has and back."""
        env: dict[str, Value] = {}
        for value in node.operands:
            if self.value(value) != value and value.name not in env:
                env[value.name] = Value(f"{node.name}.{value.name}", value.type)
                yield _cast(self.value(value), env[value.name], node)
        results = tuple(Value(f"{r.name}.own", r.type) if self.value(r) != r else r for r in node.results)
        yield replace(node.substitute(env), results=results)
        for own, result in zip(results, node.results, strict=True):
            if own != result:
                yield _cast(own, self.value(result), node)

    def node(self, node: Node) -> Node:
        if any(value.name in self.scaled for value in node.operands):  # the matrix, turned or copied
            self.scaled.update(result.name for result in node.results)
        kwargs = tuple((k, self.arg(a)) for k, a in _raw(node))
        node = replace(node, args=tuple(map(self.arg, node.args)), kwargs=kwargs, results=self.values(node))
        if self.makes_default_floats(node):
            node = replace(node, kwargs=(*node.kwargs, ("dtype", self.dtype)))
        if node.op == "encode":
            operand = node.operands[0]
            self.coded[node.name] = self.coded.get(operand.name, operand.tensor.shape)
        elif node.op in OPS and node.operands and (shape := self.coded.get(node.operands[0].name)) is not None:
            if node.op == "decode":  # a bucket has another layout now
                kind = replace(node.results[0].tensor, shape=shape)
                if kind.is_sharded and kind.varies:  # a rank's part of its shard
                    self.coded[node.name] = shape
                    kind = replace(kind, shape=(self.graph.num_shards * outer_numel(kind, self.graph.mesh),))
                self.made[node.name] = kind
                node = replace(node, results=self.values(node))
            else:
                self.coded.update((r.name, shape) for r in node.results)
        if node.op in OPS:
            kinds = OPS[node.op].rule(node, self.graph.mesh)
            self.made.update(zip((r.name for r in node.results), kinds, strict=True))
            node = replace(node, results=self.values(node))
        return node

    def makes_default_floats(self, node: Node) -> bool:
        """Whether an op makes floats of nothing, and leaves their dtype to torch."""
        is_float = any(isinstance(r.type, TensorType) and r.tensor.dtype in FLOATS for r in node.results)
        return node.op.startswith("aten.") and not node.operands and is_float and node.option("dtype") is None

    def values(self, node: Node) -> tuple[Value, ...]:
        return tuple(map(self.value, node.results))

    def value(self, value: Value) -> Value:
        if value.name in self.scaled:
            assert isinstance(value.type, TensorType)
            return Value(value.name, replace(value.type, dtype=self.dtype))
        return Value(value.name, self.made.get(value.name) or self.type(value.type))

    def arg(self, arg: Arg) -> Arg:
        match arg:
            case Value():
                return self.value(arg)
            case DType():
                return self.element(arg)
            case str():
                return _KERNEL_OPERAND.sub(f"{self.dtype.value}[", arg)
            case Graph():
                return replace(in_dtype(arg, self.dtype), foreign=arg.foreign)
            case tuple():
                return tuple(map(self.arg, arg))
        return arg

    def type(self, kind: Type) -> Type:
        return replace(kind, dtype=self.element(kind.dtype)) if isinstance(kind, TensorType) else kind

    def element(self, old: DType) -> DType:
        return self.dtype if old in FLOATS else _WIDE[self.dtype] if old in _COMPLEX else old


def _cast(value: Value, result: Value, node: Node) -> Node:
    assert isinstance(result.type, TensorType)
    return Node(CAST, (value,), (result,), (("dtype", result.type.dtype),), node.phase, node.origin)
