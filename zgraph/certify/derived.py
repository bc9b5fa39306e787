"""Types and effects of ATen ops as torch derives them: from meta functions and schemas, never from a graph's text."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch

from zgraph.bridge.aten import TO_TORCH, effects, resolve, to_torch
from zgraph.bridge.private_fake import UNKNOWN_RESULTS, deriving
from zgraph.bridge.private_higher_order import WITHOUT_DATA
from zgraph.codegen import library as _kernels  # noqa: F401 - registers the ops
from zgraph.ir import (
    HIGHER_ORDER,
    OPS,
    DType,
    ExternalOp,
    Graph,
    Node,
    ScalarType,
    TensorType,
    Type,
    Value,
    print_graph,
)
from zgraph.ir.graph import graphs_in
from zgraph.ir.symbols import evaluate
from zgraph.ir.verifier import Fault

_CPU = torch.device("cpu")
_LAYER_NORM = "aten.native_layer_norm.default"


class Derived:
    """Derives what ops make, once for each op and kinds of operands.

    Args:
        hints: a number for each symbolic size.
    """

    def __init__(self, hints: Mapping[str, int]) -> None:
        self.hints = hints
        self.known: dict[Hashable, Any] = {}
        self.num_unknown = 0
        self.seen: dict[int, Node] = {}
        self.declared: dict[str, ExternalOp] = {}

    def faults(self, graph: Graph) -> Iterator[Fault]:
        """The nodes whose results are not what torch makes of these operands, and ops with other effects."""
        declared = self.declared
        with deriving():
            for position, node in enumerate(graph.nodes):
                if node.op in OPS or id(node) in self.seen:
                    continue
                try:
                    target: Any = resolve(node.op)
                    if node.op.startswith(f"{HIGHER_ORDER}."):
                        target = WITHOUT_DATA[node.op.split(".")[1]]
                    row = effects(target, node.op, node.args, dict(node.kwargs), multi=graph.foreign[node.op].multi)
                except LookupError as error:
                    yield position, str(error)
                    continue
                known = declared.setdefault(node.op, row)
                declared[node.op] = row.either(known)
                given = [self.abstract(v.type) for v in (*node.operands, *node.results)]
                key = (
                    (node.op, str(node.args), str(node.kwargs))
                    if not node.operands
                    else (
                        node.op,
                        _shape_of(node.args),
                        _shape_of(node.kwargs),
                        *given,
                    )
                )
                if key not in self.known:
                    self.known[key] = self.wrong_functions(node) or self.wrong(node, target)
                if text := self.known[key]:
                    yield position, str(text)
                self.seen[id(node)] = node  # what another graph of the run has too is not looked at again
        for op in dict.fromkeys(n.op for n in graph.nodes if n.op not in OPS):
            row, has = declared[op], graph.foreign[op]
            is_opaque = row.opaque and not op.startswith("zgraph.")  # the kernels' own schemas say all
            wanted = row.views, row.writes, is_opaque
            if (has.views, has.writes, has.opaque) != wanted or (row.random and not has.random):
                yield None, f"{op} is declared with other effects than its schema has: {has}, not {row}"

    def wrong_functions(self, node: Node) -> str:
        """Mistake in a function that a node calls; empty if there is none."""
        for graph in graphs_in(node.args):
            inner = Derived(self.hints)
            for _, text in inner.faults(graph):
                return f'the function "{graph.name}": {text}'
            self.num_unknown += inner.num_unknown
        return ""

    def abstract(self, kind: Type) -> Hashable:
        """A type without where it is, sizes as numbers."""
        if isinstance(kind, TensorType):
            strides = None if kind.strides is None else tuple(evaluate(d, self.hints) for d in kind.strides)
            return kind.dtype.value, tuple(evaluate(d, self.hints) for d in kind.shape), strides
        return str(kind)

    def wrong(self, node: Node, target: Any) -> str:
        """Mismatch between a node's results and what torch derives; empty if there is none, or if torch cannot tell."""
        try:
            args = [to_torch(a, _CPU, self.fake) for a in node.args]
            kwargs = {k: to_torch(a, _CPU, self.fake) for k, a in node.kwargs}
            made = target(*args, **kwargs)
        except UNKNOWN_RESULTS:
            self.num_unknown += 1
            return ""
        except Exception as error:  # whatever an op says of operands that do not fit it
            if any(self.is_data(v.type) for v in node.operands):
                self.num_unknown += 1
                return ""
            return f"{node.op} does not take these operands: {str(error).splitlines()[0] if str(error) else error!r}"
        results = list(made) if isinstance(made, tuple | list) else [made]
        if len(results) != len(node.results):
            return f"{node.op} makes {len(results)} results, not {len(node.results)}"
        if node.op == _LAYER_NORM and node.results[-1].tensor.dtype is DType.f32:
            results[1:] = [statistic.float() for statistic in results[1:]]  # as GPUs make them
        for value, item in zip(node.results, results, strict=True):
            if text := self.differs(value, item):
                return text
        return ""

    def is_data(self, kind: Type) -> bool:
        """Whether a number is read off data, so that any may be the wrong one here: an index, say."""
        if not isinstance(kind, ScalarType):
            return False
        return kind.expr is None or any(str(s) not in self.hints for s in getattr(kind.expr, "free_symbols", ()))

    def fake(self, value: Value) -> Any:
        kind = value.type
        if isinstance(kind, ScalarType):
            number = 1 if kind.expr is None else evaluate(kind.expr, self.hints)
            return {"int": int, "float": float, "bool": bool}[kind.kind](number)
        if not isinstance(kind, TensorType):
            return None
        shape = [evaluate(d, self.hints) for d in kind.shape]
        dtype = TO_TORCH[kind.dtype]
        if kind.strides is None:
            return torch.empty(shape, dtype=dtype)
        return torch.empty_strided(shape, [evaluate(d, self.hints) for d in kind.strides], dtype=dtype)

    def differs(self, value: Value, made: Any) -> str:
        kind = value.type
        if not isinstance(kind, TensorType):
            return f"%{value.name} is called {kind}, but is a tensor" if isinstance(made, torch.Tensor) else ""
        if not isinstance(made, torch.Tensor):
            return f"%{value.name} is called {kind}, but is no tensor"
        shape = tuple(evaluate(d, self.hints) for d in kind.shape)
        if tuple(made.shape) != shape or made.dtype != TO_TORCH[kind.dtype]:
            return f"%{value.name} is called {kind}, but is a tensor of {made.dtype} of shape {tuple(made.shape)}"
        dense = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        strides = dense if kind.strides is None else [evaluate(d, self.hints) for d in kind.strides]
        pairs = zip(shape, strides, made.stride(), strict=True)
        if 0 not in shape and any(size > 1 and ours != theirs for size, ours, theirs in pairs):
            return f"%{value.name} is called {kind}, but has the strides {made.stride()}"
        return ""


def _shape_of(arg: Any) -> Hashable:
    """An argument with values left out: they are known by their types."""
    if isinstance(arg, Value):
        return "%"
    if isinstance(arg, tuple):
        return tuple(_shape_of(a) for a in arg)
    return type(arg).__name__, print_graph(arg) if isinstance(arg, Graph) else str(arg)
