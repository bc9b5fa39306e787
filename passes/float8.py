"""Multiply the matrices of linear layers in float8, with scales from the numbers at hand.

    fwd %t: bf16[64, 32 | 1, 64] = aten.t.default(%w)
    fwd %y: bf16[128, 32] = aten.mm.default(%x, %t)
                    |
                    v
    fwd %x_f8: f8e4m3[128, 64], %x_scale: f32[] = zgraph.to_float8.default(%x, f8e4m3, none)
    fwd %w_f8: f8e4m3[32, 64], %w_scale: f32[] = zgraph.to_float8.default(%w, f8e4m3, none)
    fwd %w_f8_t: f8e4m3[64, 32 | 1, 64] = aten.t.default(%w_f8)
    fwd %y: bf16[128, 32] = zgraph.float8_mm.default(%x_f8, %x_scale, %w_f8_t, %w_scale, bf16, true)

The recipes are those of torchao's `Float8Linear`. `tensorwise`: one scale a matrix; gradients of outputs are in e5m2.
`rowwise`: one scale, a power of two, for each row of the first matrix and each column of the second; all is in e4m3. A
layer's three products are in float8: its output, and the gradients of its input and of its weight. In the backward, the
weight is cast again, so that no rank keeps it whole; by tensors, the input is kept in float8.

A layer stays in its own dtype if one of its sizes is no multiple of 16 (kernels need that), or if its name ends in one
of those in `exclude`: the projection to the vocabulary, whose numbers the loss reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

from zgraph.ir import Arg, DType, ExternalOp, Graph, Node, Phase, TensorType, Token, Value
from zgraph.ir.builder import Builder
from zgraph.ir.external_ops import FLOAT8, FLOAT8_MM, facts
from zgraph.passes.analysis.operands import Operand, operand_of
from zgraph.passes.core.base import Context, Numerics, Pass
from zgraph.passes.dce import DeadCode

Recipe = Literal["tensorwise", "rowwise"]

MULTIPLE = 16
"""All sizes of a product in float8 are multiples of this."""

_COMPUTED = (DType.bf16, DType.f16, DType.f32)
_T, _CLONE, _ADD = "aten.t.default", "aten.clone.default", "aten.add.Tensor"
_ROWS = {
    FLOAT8: ExternalOp(multi=True),
    FLOAT8_MM: ExternalOp(),
    _T: ExternalOp(views=(0,)),
    _CLONE: ExternalOp(),
    _ADD: ExternalOp(),
}


@dataclass(frozen=True)
class Float8(Pass):
    """Multiply the matrices of linear layers in float8, with scales from the numbers at hand.

    Args:
        recipe: "tensorwise" or "rowwise".
        exclude: last names of the layers that stay as they are, with + between them.
    """

    recipe: Recipe = "tensorwise"
    exclude: str = "lm_head+output+embed_out"

    name: ClassVar[str] = "float8"
    numerics: ClassVar[Numerics] = Numerics.approximate
    provides: ClassVar[frozenset[str]] = frozenset({"float8"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"placed", "float8"})

    def __post_init__(self) -> None:
        if self.recipe not in get_args(Recipe):
            raise ValueError("recipe must be tensorwise or rowwise")

    def run(self, graph: Graph, context: Context) -> Graph:
        products = [p for p in _products(graph, self.exclude) if not p.why_not]
        if not products:
            return graph
        return DeadCode().run(_Rewriter(graph, self, products).run(), context)

    def left_out(self, graph: Graph) -> dict[str, str]:
        """The linear layers of a captured graph that stay as they are, by name, and why."""
        forward = (p for p in _products(graph, self.exclude) if p.role == "output")
        return {p.layer: p.why_not for p in forward if p.why_not}

    def layers(self, graph: Graph) -> list[str]:
        """The linear layers of a captured graph that are multiplied in float8, by name."""
        return [p.layer for p in _products(graph, self.exclude) if p.role == "output" and not p.why_not]


@dataclass(frozen=True)
class _Product:
    """One of the products of a linear layer.

    Args:
        node: the matmul.
        a, b: its matrices.
        role: which of the three it is.
        layer: the module whose output it is; empty for gradients.
        why_not: why it stays as it is; empty if it does not.
    """

    node: Node
    a: Operand
    b: Operand
    role: Literal["output", "grad_input", "grad_weight"]
    layer: str
    why_not: str


def _products(graph: Graph, exclude: str) -> Iterator[_Product]:
    """The products of all linear layers, in the graph's order."""
    parameters = {i.value.name for i in graph.params if len(i.value.tensor.shape) == 2}
    outputs: list[_Product] = []
    refused: dict[str, str] = {}
    for node in graph.nodes:
        if node.op not in ("aten.mm.default", "aten.addmm.default") or node.kwargs:
            continue
        a, b = (operand_of(graph, v) for v in node.operands[-2:])
        if node.phase is Phase.forward and b.value.name in parameters and b.is_turned:
            layer = node.origin.module
            why = _why_not(a, b, layer, exclude)
            outputs.append(_Product(node, a, b, "output", layer, why))
            refused[b.value.name] = refused.get(b.value.name) or why
            yield outputs[-1]
        elif node.phase is Phase.backward and node.op == "aten.mm.default":
            if b.value.name in parameters and not b.is_turned:
                why = refused.get(b.value.name, "its output is no product")
                yield _Product(node, a, b, "grad_input", "", why)
            elif a.is_turned:
                of = [p for p in outputs if p.a == b and p.b.value.tensor.shape[0] == a.value.tensor.shape[1]]
                if of:
                    yield _Product(node, a, b, "grad_weight", "", next((p.why_not for p in of if p.why_not), ""))


def _why_not(a: Operand, b: Operand, layer: str, exclude: str) -> str:
    if layer.rpartition(".")[2] in exclude.split("+"):
        return "excluded by name"
    if a.value.tensor.dtype not in _COMPUTED or a.value.tensor.dtype is not b.value.tensor.dtype:
        return f"computed in {a.value.tensor.dtype.value}"
    odd = [d for d in (*a.shape, b.shape[1]) if not isinstance(d, int) or d % MULTIPLE or not d]
    if any(not isinstance(d, int) for d in odd):
        return "a size changes from call to call"
    return f"{odd[0]} is no multiple of {MULTIPLE}" if odd else ""


class _Rewriter:
    """One run of the pass."""

    def __init__(self, graph: Graph, options: Float8, products: list[_Product]) -> None:
        self.graph, self.options, self.products = graph, options, products
        self.nodes: list[Node] = []
        self.made: dict[tuple[object, ...], tuple[Value, Value]] = {}
        self.placed: dict[tuple[object, ...], Value] = {}
        self.builder = Builder(self.graph, Float8.name)
        self.parameters = {i.value.name for i in self.graph.params}

    def run(self) -> Graph:
        by_node = {id(p.node): p for p in self.products}
        for node in self.graph.nodes:
            product = by_node.get(id(node))
            if product is None:
                self.nodes.append(node)
            else:
                self.replace(product)
        used = {node.op for node in self.nodes}
        foreign: Mapping[str, ExternalOp] = {op: row for op, row in _ROWS.items() if op in used}
        return replace(self.graph, nodes=tuple(self.nodes), foreign={**foreign, **self.graph.foreign})

    def replace(self, product: _Product) -> None:
        """Put a product of float8 where one was, behind the casts that it needs."""
        node, is_by_tensor = product.node, self.options.recipe == "tensorwise"
        wide = DType.f8e5m2 if is_by_tensor else DType.f8e4m3
        kinds = (DType.f8e4m3 if product.role == "output" else wide, DType.f8e4m3)
        a = self.matrix(product, product.a, kinds[0], contracted=1)
        b = self.matrix(product, product.b, kinds[1], contracted=0)
        (result,) = node.results
        fast = not is_by_tensor or product.role == "output"
        bias = node.operands[0] if node.op == "aten.addmm.default" else None
        out = result if bias is None else self.builder.value(f"{result.name}_product", result.type)
        self.add(product, FLOAT8_MM, (*a, *b, result.tensor.dtype, fast), out)
        if bias is not None:
            self.add(product, _ADD, (out, bias), result)

    def matrix(self, product: _Product, operand: Operand, dtype: DType, contracted: int) -> tuple[Value, Value]:
        """A matrix in float8 with its scales: the first of a product row-major, the second column-major.

        Args:
            product: what it is for.
            operand: the matrix.
            dtype: of float8.
            contracted: the dim that the product sums over, and scales by rows are taken along.
        """
        dim = None if self.options.recipe == "tensorwise" else contracted ^ operand.is_turned
        data, scale = self.cast(product, operand.value, dtype, dim)
        if operand.is_turned:
            data = self.once(product, _T, data)
            scale = self.once(product, _T, scale) if dim is not None else scale
        if operand.is_turned and contracted == 1:
            data = self.once(product, _CLONE, data)
        elif not operand.is_turned and contracted == 0:
            data = self.once(product, _T, self.once(product, _CLONE, self.once(product, _T, data)))
        return data, scale

    def cast(self, product: _Product, value: Value, dtype: DType, dim: int | None) -> tuple[Value, Value]:
        """A matrix in float8 and its scales; made once, but for a parameter's, which the backward makes again."""
        phase = product.node.phase
        maker = self.graph.producers.get(value.name)
        source: object = value.name
        if maker is not None and facts(maker.op).elements == "reshaped":
            source = (maker.op, maker.args)
        key = (source, dtype, dim, phase if value.name in self.parameters else None)
        if key not in self.made:
            rows, columns = value.tensor.shape
            sizes = {None: (), 0: (1, columns), 1: (rows, 1)}[dim]
            made = self.builder.value(f"{value.name}_f8", value.tensor.contiguous(dtype))
            scale = self.builder.value(f"{value.name}_scale", TensorType(DType.f32, sizes))
            self.add(product, FLOAT8, (value, dtype, dim), made, scale)
            self.made[key] = made, scale
        return self.made[key]

    def once(self, product: _Product, op: str, value: Value) -> Value:
        """A matrix transposed or in dense memory, made once in each program."""
        key = (op, value.name, product.node.phase)
        if key not in self.placed:
            kind = value.tensor
            if op == _T:
                shape, strides = kind.shape[::-1], kind.strides or (kind.shape[1], 1)
                turned = strides[::-1]
                dense = turned == (shape[1], 1)
                made = self.builder.value(
                    f"{value.name}_t", replace(kind, shape=shape, strides=None if dense else turned)
                )
                self.add(product, op, (value,), made)
            else:
                made = self.builder.value(f"{value.name}_dense", kind.contiguous())
                self.add(product, op, (value,), made, memory_format=Token("memory_format", "contiguous_format"))
            self.placed[key] = made
        return self.placed[key]

    def add(self, product: _Product, op: str, args: Iterable[Arg], *results: Value, **options: Arg) -> None:
        """A node in the place of a product's."""
        node = product.node
        made = self.builder.typed(op, args, results, node.phase, node.origin, **options)
        self.nodes.append(replace(made, checkpoint=node.checkpoint))
