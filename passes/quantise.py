"""Keep the weights of a forward in int8 or int4, and multiply with them as they are.

    fwd %t: f32[64, 32 | 1, 64] = aten.t.default(%w)
    fwd %y: f32[4, 32] = aten.mm.default(%x, %t)
                    |
                    v
    fwd %w_i8: i8[32, 64], %w_scale: f32[32, 1] = zgraph.to_int8.default(%w, 1)
    fwd %x_i8: i8[12, 64], %x_scale: f32[4, 1] = zgraph.to_int8.default(%x, 3)
    fwd %y: f32[4, 32] = zgraph.int8_mm.default(%x_i8, %w_i8, %x_scale, %w_scale, f32)

`int8` has one scale for each output of a layer. Activations are then three rows of int8 each, which keeps 21 bits of
them, or one (`activations=int8`) but in the layers named in `precise`. With `outliers`, so many columns of these keep
three rows, and are multiplied apart from the rest, where they are zeros, with weights that have scales of their own; a
constant of each layer says which. `int4` has one scale for each group of columns, and bf16 activations; the layers
named in `wider` have int8. Its integers are rounded here, or were (`calibrated`) and are constants. A table of
embeddings is in int8 in both.

What depends on weights alone is for `zgraph.passes.plan.fixed` to compute once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

from zgraph.errors import QuantisationError
from zgraph.ir import Arg, DType, ExternalOp, Graph, Input, InputKind, Node, TensorType, Token, Value
from zgraph.ir.builder import Builder
from zgraph.ir.external_ops import (
    CAST,
    INT4,
    INT4_LINEAR,
    INT4_MM,
    INT4_PACK,
    INT8,
    INT8_EMBEDDING,
    INT8_LINEAR,
    INT8_MM,
    facts,
)
from zgraph.passes.analysis.integers import int8_of, integers_cut, integers_of, outliers_of
from zgraph.passes.analysis.operands import TRANSPOSE, Operand, operand_of
from zgraph.passes.core.base import Context, Numerics, Pass
from zgraph.passes.dce import DeadCode

Weights = Literal["int8", "int4"]
Activations = Literal["wide", "int8"]

GROUPS = (32, 64, 128)
"""Columns that may share a scale, of int4: those that torch's kernel has."""

INT4_ROWS = 16
"""Outputs of a layer in int4 are a multiple of this."""

WIDE_PARTS = 3
"""Rows of int8 for each row of activations, where these are to be kept."""

_FLOATS = (DType.bf16, DType.f16, DType.f32)
_CHOSEN, _FILLED = "aten.index_select.default", "aten.index_fill.int_Scalar"
_ADD, _CLONE, _MUL, _EMBEDDING = "aten.add.Tensor", "aten.clone.default", "aten.mul.Tensor", "aten.embedding.default"
_ROWS = {
    INT8: ExternalOp(multi=True),
    INT4: ExternalOp(multi=True),
    INT8_MM: ExternalOp(),
    INT8_LINEAR: ExternalOp(),
    INT4_LINEAR: ExternalOp(),
    INT8_EMBEDDING: ExternalOp(),
    INT4_PACK: ExternalOp(),
    INT4_MM: ExternalOp(),
    TRANSPOSE: ExternalOp(views=(0,)),
    CAST: ExternalOp(),
    _CLONE: ExternalOp(),
    _ADD: ExternalOp(),
    _MUL: ExternalOp(),
    _CHOSEN: ExternalOp(),
    _FILLED: ExternalOp(),
}


@dataclass(frozen=True)
class Quantise(Pass):
    """Keep the weights of a forward in int8 or int4, and multiply with them as they are.

    Args:
        weights: "int8" or "int4".
        activations: "wide" keeps them; "int8" rounds each token's to int8, for weights in int8.
        group: columns that share a scale, in int4.
        wider: last names of the layers that int4 leaves in int8, or names of their weights without `.weight`, with +
            between them.
        precise: last names of the layers whose activations are kept: those behind a product, which has outliers.
        calibrated: whether the integers of int4 are there already, as constants, and not to be made of the weights.
        apart: whether all integers are, for ranks to have parts of them.
        outliers: columns of all other activations that are kept, where these are rounded; 0 keeps none.
    """

    weights: Weights = "int8"
    activations: Activations = "wide"
    group: int = 64
    wider: str = "lm_head+output+embed_out"
    precise: str = "down_proj+fc2+w2"
    outliers: int = 0
    calibrated: bool = False
    apart: bool = False

    name: ClassVar[str] = "quantise"
    numerics: ClassVar[Numerics] = Numerics.approximate
    provides: ClassVar[frozenset[str]] = frozenset({"quantised"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"placed", "quantised", "float8"})

    def __post_init__(self) -> None:
        if self.weights not in get_args(Weights):
            raise ValueError("weights must be int8 or int4")
        if self.activations not in get_args(Activations):
            raise ValueError("activations must be wide or int8")
        if self.activations == "int8" and self.weights != "int8":
            raise ValueError("activations=int8 needs weights=int8")
        if self.group not in GROUPS:
            raise ValueError(f"group must be one of {', '.join(map(str, GROUPS))}")
        if self.calibrated and self.weights != "int4":
            raise ValueError("calibrated is for weights=int4")
        if self.apart and self.activations == "int8":
            raise ValueError("apart is for activations=wide")
        if self.outliers < 0 or (self.outliers and self.activations != "int8"):
            raise ValueError("outliers must be 0 or more, and needs activations=int8")

    def run(self, graph: Graph, context: Context) -> Graph:
        layers = list(_layers(graph, self))
        if wrong := [layer for layer in layers if layer.why_not]:
            raise QuantisationError(
                f"{len(wrong)} of {len(layers)} layers cannot be kept in {self.weights}, first "
                f"{wrong[0].name or wrong[0].weight.value.name}: {wrong[0].why_not}"
            )
        if not layers:
            return graph
        return DeadCode().run(_Rewriter(graph, self, layers).run(), context)

    def layers(self, graph: Graph) -> dict[str, str]:
        """The integers that the weight of each layer of a forward is kept in, by the layer's name."""
        return {layer.name: layer.kept_in for layer in _layers(graph, self)}


@dataclass(frozen=True)
class _Layer:
    """A product with a weight, or a lookup in one.

    Args:
        node: the matmul, or the lookup.
        name: the module.
        x: activations, or indices.
        weight: the matrix.
        kept_in: the weight's dtype.
        why_not: why it cannot be; empty if it can.
    """

    node: Node
    name: str
    x: Value
    weight: Operand
    kept_in: Weights
    why_not: str


def _layers(graph: Graph, options: Quantise) -> Iterator[_Layer]:
    parameters = {i.value.name for i in graph.params if len(i.value.tensor.shape) == 2}
    tables = {n.operands[0].name for n in graph.nodes if n.op == _EMBEDDING}
    wanted = options.wider.split("+")
    wide = {i.value.name for i in graph.params if i.target.removesuffix(".weight") in wanted}
    for node in graph.nodes:
        name = node.origin.module
        if node.op == _EMBEDDING and node.operands[0].name in parameters:
            if node.operands[0].tensor.dtype in _FLOATS:
                yield _Layer(node, name, node.operands[1], Operand(node.operands[0], False), "int8", "")
        elif node.op in ("aten.mm.default", "aten.addmm.default") and not node.kwargs:
            x, value = node.operands[-2:]
            weight = operand_of(graph, value)
            if weight.value.name not in parameters or weight.value.tensor.dtype not in _FLOATS:
                continue
            is_wide = _is_among(name, options.wider) or weight.value.name in tables or weight.value.name in wide
            kept_in: Weights = "int8" if is_wide else options.weights
            why_not = _why_not(weight, options.group) if kept_in == "int4" else ""
            yield _Layer(node, name, x, weight, kept_in, why_not)


def _is_among(name: str, last_names: str) -> bool:
    return name.rpartition(".")[2] in last_names.split("+")


def _why_not(weight: Operand, group: int) -> str:
    columns, outputs = weight.shape
    if isinstance(columns, int) and columns % group:
        fits = [g for g in GROUPS if columns % g == 0]
        remedy = f"pass group={max(fits)}" if fits else "keep it in int8, by its name in wider= or weights=int8"
        return f"groups of {group} do not divide its {columns} columns; {remedy}"
    if isinstance(outputs, int) and outputs % INT4_ROWS:
        return f"its {outputs} outputs are no multiple of {INT4_ROWS}; keep it in int8, by its name in wider="
    return ""


class _Rewriter:
    """One run of the pass."""

    def __init__(self, graph: Graph, options: Quantise, layers: list[_Layer]) -> None:
        self.graph, self.options = graph, options
        self.by_node = {id(layer.node): layer for layer in layers}
        self.nodes: list[Node] = []
        self.made: dict[tuple[object, ...], tuple[Value, Value]] = {}
        self.parts: dict[tuple[object, ...], tuple[Value, Value, Value]] = {}
        self.entries = {i.value.name: i for i in graph.inputs}
        self.constants: list[Input] = []
        self.builder = Builder(graph, Quantise.name)

    def run(self) -> Graph:
        for node in self.graph.nodes:
            layer = self.by_node.get(id(node))
            if layer is None:
                self.nodes.append(node)
            elif node.op == _EMBEDDING:
                self.look_up(layer)
            else:
                self.multiply(layer)
        used = {node.op for node in self.nodes}
        foreign = {op: row for op, row in _ROWS.items() if op in used}
        inputs = (*self.graph.inputs, *self.constants)
        return replace(self.graph, inputs=inputs, nodes=tuple(self.nodes), foreign={**foreign, **self.graph.foreign})

    def multiply(self, layer: _Layer) -> None:
        """A product with integers in the place of a product."""
        node, (result,) = layer.node, layer.node.results
        bias = node.operands[0] if node.op == "aten.addmm.default" else None
        out = result if bias is None else self.builder.value(f"{result.name}_product", result.type)
        dtype = result.tensor.dtype
        if layer.kept_in == "int4" and self.options.apart:
            self.add(layer, INT4_LINEAR, (layer.x, *self.given(layer, "int4"), self.options.group, dtype), out)
        elif layer.kept_in == "int4":
            packed, scales = self.int4(layer)
            self.add(layer, INT4_MM, (layer.x, packed, scales, self.options.group, dtype), out)
        else:
            self.int8_product(layer, out, dtype)
        if bias is not None:
            self.add(layer, _ADD, (out, bias), result)

    def int8_product(self, layer: _Layer, out: Value, dtype: DType) -> None:
        """A product with a weight in int8."""
        options, columns = self.options, layer.x.tensor.shape[1]
        if options.apart:
            self.add(layer, INT8_LINEAR, (layer.x, *self.given(layer, "int8"), WIDE_PARTS, dtype), out)
            return
        is_rounded = options.activations == "int8" and not _is_among(layer.name, options.precise)
        has_rest = not isinstance(columns, int) or columns > options.outliers
        if not (is_rounded and options.outliers and has_rest):
            x, x_scale = self.int8(layer, layer.x, 1 if is_rounded and has_rest else WIDE_PARTS)
            w, w_scale = self.weight(layer)
            self.add(layer, INT8_MM, (x, w, x_scale, w_scale, dtype), out)
            return
        rest, kept, chosen = self.parted(layer)
        w, w_scale = self.weight(layer)
        (x, x_scale), (y, y_scale) = self.int8(layer, rest, 1), self.int8(layer, kept, WIDE_PARTS)
        rows = self.rows(layer)
        kind = replace(rows.tensor, shape=(rows.tensor.shape[0], options.outliers)).contiguous()
        few = self.builder.value(f"{rows.name}_kept", kind)
        self.add(layer, _CHOSEN, (rows, 1, chosen), few)
        v, v_scale = self.int8(layer, few, 1)
        most, others = (self.builder.value(f"{out.name}_{part}", out.type) for part in ("rest", "kept"))
        self.add(layer, INT8_MM, (x, w, x_scale, w_scale, dtype), most)
        self.add(layer, INT8_MM, (y, v, y_scale, v_scale, dtype), others)
        self.add(layer, _ADD, (most, others), out)

    def parted(self, layer: _Layer) -> tuple[Value, Value, Value]:
        """A layer's activations with zeros in the place of outliers, these alone, and their columns; made once."""
        x = layer.x
        key = (_FILLED, self.source(x))
        if key not in self.parts:
            kind = x.tensor.contiguous()
            columns = self.builder.value(f"{x.name}_outliers", TensorType(DType.i64, (self.options.outliers,)))
            rest = self.builder.value(f"{x.name}_rest", kind)
            kept = self.builder.value(f"{x.name}_kept", replace(kind, shape=(kind.shape[0], self.options.outliers)))
            target = self.entries[layer.weight.value.name].target
            self.constants.append(Input(InputKind.constant, columns, outliers_of(target)))
            self.add(layer, _FILLED, (x, 1, columns, 0), rest)
            self.add(layer, _CHOSEN, (x, 1, columns), kept)
            self.parts[key] = rest, kept, columns
        return self.parts[key]

    def source(self, value: Value) -> object:
        """A value, or what it is another shape of."""
        maker = self.graph.producers.get(value.name)
        if maker is not None and facts(maker.op).elements == "reshaped":
            return maker.op, maker.args
        return value.name

    def look_up(self, layer: _Layer) -> None:
        """Rows of integers, and their scales, in the place of rows."""
        node, (result,) = layer.node, layer.node.results
        if self.options.apart:
            self.look_up_apart(layer)
            return
        data, scale = self.weight(layer)
        rest, kind = node.args[2:], result.tensor
        rows = self.builder.value(f"{result.name}_i8", replace(kind, dtype=DType.i8))
        scales = self.builder.value(f"{result.name}_scale", TensorType(DType.f32, (*kind.shape[:-1], 1)))
        wide = self.builder.value(f"{result.name}_wide", replace(kind, dtype=DType.f32))
        is_wide = kind.dtype is DType.f32
        out = result if is_wide else self.builder.value(f"{result.name}_scaled", wide.type)
        self.add(layer, _EMBEDDING, (data, layer.x, *rest), rows)
        self.add(layer, _EMBEDDING, (scale, layer.x, *rest), scales)
        self.add(layer, CAST, (rows,), wide, dtype=DType.f32)
        self.add(layer, _MUL, (wide, scales), out)
        if not is_wide:
            self.add(layer, CAST, (out,), result, dtype=kind.dtype)

    def look_up_apart(self, layer: _Layer) -> None:
        """Rows of numbers, by an op of integers and scales that ranks may have parts of."""
        (result,) = layer.node.results
        data, scale = self.given(layer, "int8")
        is_wide = result.tensor.dtype is DType.f32
        wide = replace(result.tensor, dtype=DType.f32)
        out = result if is_wide else self.builder.value(f"{result.name}_wide", wide)
        self.add(layer, INT8_EMBEDDING, (data, layer.x, scale), out)
        if not is_wide:
            self.add(layer, CAST, (out,), result, dtype=result.tensor.dtype)

    def given(self, layer: _Layer, kept_in: Weights) -> tuple[Value, Value]:
        """The integers and the scales of a weight as constants, cut as it is."""
        value, stem = layer.weight.value, layer.weight.value.name
        key = ("given", stem)
        if key not in self.made:
            is_turned = not (layer.weight.is_turned or layer.node.op == _EMBEDDING)
            outputs, columns = value.tensor.shape[::-1] if is_turned else value.tensor.shape
            if kept_in == "int8":
                kinds = TensorType(DType.i8, (outputs, columns)), TensorType(DType.f32, (outputs, 1))
                names, targets = ("i8", "scale"), int8_of(self.entries[stem].target)
            else:
                assert isinstance(columns, int), "groups divide it"
                groups = columns // self.options.group
                kinds = TensorType(DType.u8, (outputs, columns // 2)), TensorType(DType.bf16, (groups, outputs, 2))
                names, targets = ("pairs", "scales"), integers_of(self.entries[stem].target)
            found = tuple(self.builder.value(f"{stem}_{n}", k) for n, k in zip(names, kinds, strict=True))
            cuts = integers_cut(self.entries[stem].cuts, is_turned=is_turned, in_int4=kept_in == "int4")
            self.constants += [
                Input(InputKind.constant, v, t, cuts=c) for v, t, c in zip(found, targets, cuts, strict=True)
            ]
            self.made[key] = found[0], found[1]
        return self.made[key]

    def weight(self, layer: _Layer) -> tuple[Value, Value]:
        """A weight as rows of int8, one for each output."""
        return self.int8(layer, self.rows(layer), 1)

    def int4(self, layer: _Layer) -> tuple[Value, Value]:
        """A weight as int4, packed, and its scales; made once."""
        stem, group = layer.weight.value.name, self.options.group
        key = (INT4, stem)
        if key in self.made:
            return self.made[key]
        if self.options.calibrated:
            pairs, scales = self.given(layer, "int4")
            packed = self.builder.value(f"{stem}_i4", pairs.type)
            self.add(layer, INT4_PACK, (pairs,), packed)
        else:
            value = self.rows(layer)
            outputs, columns = (int(d) for d in value.tensor.shape)
            packed = self.builder.value(f"{stem}_i4", TensorType(DType.u8, (outputs, columns // 2)))
            scales = self.builder.value(f"{stem}_scales", TensorType(DType.bf16, (columns // group, outputs, 2)))
            self.add(layer, INT4, (value, group), packed, scales)
        self.made[key] = packed, scales
        return packed, scales

    def int8(self, layer: _Layer, value: Value, parts: int) -> tuple[Value, Value]:
        """A matrix as rows of int8, and their scales; made once of what is the same in another shape."""
        key = (INT8, self.source(value), parts)
        if key not in self.made:
            rows, columns = value.tensor.shape
            data = self.builder.value(f"{value.name}_i8", TensorType(DType.i8, (parts * rows, columns)))
            scale = self.builder.value(f"{value.name}_scale", TensorType(DType.f32, (rows, 1)))
            self.add(layer, INT8, (value, parts), data, scale)
            self.made[key] = data, scale
        return self.made[key]

    def rows(self, layer: _Layer) -> Value:
        """A weight with one row for each output."""
        value, kind = layer.weight.value, layer.weight.value.tensor
        if layer.weight.is_turned or layer.node.op == _EMBEDDING:
            return value
        key = (_CLONE, value.name)
        if key not in self.made:
            turned = replace(kind, shape=kind.shape[::-1], strides=(1, kind.shape[1]))
            view = self.builder.value(f"{value.name}_t", turned)
            dense = self.builder.value(f"{value.name}_rows", turned.contiguous())
            self.add(layer, TRANSPOSE, (value,), view)
            self.add(layer, _CLONE, (view,), dense, memory_format=Token("memory_format", "contiguous_format"))
            self.made[key] = dense, dense
        return self.made[key][0]

    def add(self, layer: _Layer, op: str, args: Iterable[Arg], *results: Value, **options: Arg) -> None:
        """A node in the place of a layer's."""
        node = layer.node
        self.nodes.append(self.builder.typed(op, args, results, node.phase, node.origin, **options))
