"""Rows as kernels work on them: which values lie in them, and which ops are steps of a kernel there."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from zgraph.codegen.ops import Extent
from zgraph.codegen.spec import Step
from zgraph.ir import Arg, DType, Graph, Node, TensorType, Value
from zgraph.ir.external_ops import facts
from zgraph.passes.fusion.patterns import PATTERNS, Pattern

FLOATS = frozenset({DType.f32, DType.bf16, DType.f16})


@dataclass(frozen=True)
class Space:
    """The rows that a kernel works on: a tensor of this many elements whose rows have so many columns."""

    numel: object
    columns: int

    def extent(self, value: Value) -> Extent | None:
        """The extent of a value in a kernel over these rows; None if such a kernel cannot take the value."""
        kind = value.type
        if not isinstance(kind, TensorType) or kind.strides is not None or kind.is_sharded:
            return None
        if kind.dtype not in FLOATS and kind.dtype is not DType.bool:
            return None
        last = kind.shape[-1] if kind.shape else 1
        if kind.numel == self.numel and last == self.columns:
            return Extent.full
        if last == 1 and kind.numel * self.columns == self.numel and kind.shape:
            return Extent.column
        if last == self.columns and kind.numel == self.columns:
            return Extent.row
        return Extent.scalar if kind.numel == 1 and not kind.shape else None


class Views:
    """Values as kernels see them: looked at through views that leave rows as they are."""

    def __init__(self, graph: Graph) -> None:
        self.same: dict[str, Value] = {}
        self.base: dict[str, str] = {}
        for node in graph.nodes:
            if not facts(node.op).keeps_rows:
                continue
            source, result = node.operands[0], node.results[0]
            self.base[result.name] = self.base.get(source.name, source.name)
            if same_rows(source, result):
                self.same[result.name] = self.root(source)

    def root(self, value: Value) -> Value:
        """The value itself, whatever shape it is seen in."""
        return self.same.get(value.name, value)


def same_rows(source: Value, result: Value) -> bool:
    """Whether a view has the same rows, one after the other, or one number of each row for all of its columns."""
    a, b = source.type, result.type
    if not isinstance(a, TensorType) or not isinstance(b, TensorType) or a.strides is not None or not a.shape:
        return False
    if a.shape[-1] == 1 and a.shape[:-1] == b.shape[:-1]:
        return True
    return b.strides is None and a.shape[-1:] == b.shape[-1:] and a.numel == b.numel


@dataclass(frozen=True)
class Match:
    """A pattern, with the value or number that each of its names is bound to."""

    pattern: Pattern
    bound: Mapping[str, Value | float]

    def making(self, node: Node, wanted: Collection[str]) -> list[Step]:
        """The steps that make those results of the node that are wanted."""
        names = zip(self.pattern.results, node.results, strict=True)
        return self.pattern.making([name for name, result in names if result.name in wanted])


def match(node: Node, views: Views, space: Space) -> Match | None:
    """The pattern that a node is of, if all that it reads and makes lies in these rows."""
    keywords = {} if facts(node.op).options_in_types else {name: written(arg) for name, arg in node.kwargs}
    for pattern in PATTERNS.get(node.op, ()):
        bound = _bind(pattern, node)
        if bound is None or keywords != pattern.keywords or len(pattern.results) != len(node.results):
            continue
        if any(space.extent(views.root(v)) is None for v in bound.values() if isinstance(v, Value)):
            continue
        if all(space.extent(r) is not None for r in node.results):
            return Match(pattern, bound)
    return None


def _bind(pattern: Pattern, node: Node) -> dict[str, Value | float] | None:
    rank = next((len(v.type.shape) for v in node.operands if isinstance(v.type, TensorType)), 0)
    bound: dict[str, Value | float] = {}
    if len(node.args) > len(pattern.args):
        return None
    for position, wanted in enumerate(pattern.args):
        arg = node.args[position] if position < len(node.args) else None
        if not _NAME.fullmatch(wanted) or wanted in _WORDS:
            if wanted != "_" and wanted != (dims(arg, rank) if wanted in _DIMS else written(arg)):
                return None
        elif isinstance(arg, Value) or (isinstance(arg, int | float) and not isinstance(arg, bool)):
            bound[wanted] = arg if isinstance(arg, Value) else float(arg)
        else:
            return None
    return bound


_NAME = re.compile(r"[a-z]\w*")
_DIMS = ("last", "rows")
_WORDS = frozenset({"none", "true", "false", *_DIMS})


def dims(arg: Arg, rank: int) -> str:
    """Dimensions as patterns write them; nothing for others, and for none: to torch these are all."""
    dims = [d for d in (arg if isinstance(arg, tuple) else (arg,)) if isinstance(d, int)]
    around = sorted(d % rank for d in dims) if rank else []
    if not around:
        return ""
    return "last" if around == [rank - 1] else "rows" if around == list(range(rank - 1)) else ""


def written(arg: Arg) -> str:
    """An argument as patterns write it."""
    if isinstance(arg, tuple):
        return "[" + ",".join(map(written, arg)) + "]"
    if isinstance(arg, int | float) and not isinstance(arg, bool):
        return f"{arg:g}"
    return str(arg).lower()
