"""Products in float8 as the products that they approximate, to compare a graph with the one before it.

    to_float8(x), to_float8(w), float8_mm(...)          ->      mm(x, t(w))

Nothing of the pass is believed: each scale is of the matrix that it stands beside, taken along the dim that the product
sums over, and each matrix lies in memory as kernels want it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from zgraph.ir import DType, ExternalOp, Graph, Node, TensorType, Value
from zgraph.ir.builder import Builder
from zgraph.ir.external_ops import FLOAT8, FLOAT8_MM
from zgraph.ir.verifier import Fault

_T, _CLONE, _MM, _ADDMM, _ADD = (
    "aten.t.default",
    "aten.clone.default",
    "aten.mm.default",
    "aten.addmm.default",
    "aten.add.Tensor",
)
_FLOAT8 = (DType.f8e4m3, DType.f8e5m2)


@dataclass(frozen=True)
class Cast:
    """A matrix of a product in float8.

    Args:
        source: what was cast.
        is_turned: whether the product reads its transpose.
    """

    source: Value
    is_turned: bool


def products(graph: Graph) -> Counter[str]:
    """The products in float8, by name."""
    return Counter(n.name for n in graph.nodes if n.op == FLOAT8_MM)


def faults(graph: Graph) -> Iterator[Fault]:
    """Products whose matrices are not what they must be."""
    for position, node in enumerate(graph.nodes):
        if node.op == FLOAT8_MM and (found := matrices(graph, node)) is not None and isinstance(found, str):
            yield position, found


def matrices(graph: Graph, node: Node) -> tuple[Cast, Cast] | str:
    """The two matrices of a product as they were before the casts, or the fault that they have."""
    a, a_scale, b, b_scale = node.operands
    found = _matrix(graph, a, a_scale, contracted=1), _matrix(graph, b, b_scale, contracted=0)
    for each in found:
        if isinstance(each, str):
            return each
    first, second = found
    assert isinstance(first, Cast)
    assert isinstance(second, Cast)
    if bool(a_scale.tensor.shape) != bool(b_scale.tensor.shape):
        return "has one matrix with a scale in all and one with more"
    kind = node.results[0].tensor.dtype
    if {first.source.tensor.dtype, second.source.tensor.dtype, node.args[4]} != {kind}:
        return f"makes {kind.value} of matrices in another dtype"
    return first, second


def _matrix(graph: Graph, data: Value, scale: Value, contracted: int) -> Cast | str:
    wanted = (None, (data.tensor.shape[1], 1)) if contracted else ((1, data.tensor.shape[0]),)
    if data.tensor.dtype not in _FLOAT8 or data.tensor.strides not in wanted:
        return f"%{data.name} does not lie as kernels want it"
    made, is_turned = _origin(graph, data)
    scaled, scale_is_turned = _origin(graph, scale)
    cast = graph.producers.get(made.name)
    if cast is None or cast.op != FLOAT8 or cast.results != (made, scaled):
        return f"%{scale.name} is not the scale of %{data.name}"
    dim = cast.args[2]
    if dim is not None and (dim != (contracted ^ is_turned) or is_turned != scale_is_turned):
        return f"%{scale.name} is not along the dim that is summed over"
    return Cast(cast.operands[0], is_turned)


def _origin(graph: Graph, value: Value) -> tuple[Value, bool]:
    """The value that another is a copy or a transpose of, and whether that is turned."""
    is_turned = False
    while (node := graph.producers.get(value.name)) is not None and node.op in (_T, _CLONE):
        is_turned ^= node.op == _T
        value = node.operands[0]
    return value, is_turned


def in_full(graph: Graph) -> Graph:
    """The graph with each product in float8 as the one that it approximates; those of `faults` stay."""
    builder, nodes = Builder(graph, "float8"), list[Node]()
    biased: dict[str, tuple[Value, Value]] = {}
    for node in graph.nodes:
        found = matrices(graph, node) if node.op == FLOAT8_MM else ""
        if isinstance(found, str):
            with_bias = biased.get(node.operands[0].name) if node.op == _ADD and node.operands else None
            nodes.append(replace(node, op=_ADDMM, args=(node.args[1], *with_bias)) if with_bias else node)
            continue
        pair = _turned(found[0], builder, node, nodes), _turned(found[1], builder, node, nodes)
        users = [graph.nodes[i] for i in graph.users.get(node.name, ())]
        if (
            len(users) == 1
            and users[0].op == _ADD
            and users[0].operands[0] == node.results[0]
            and len(users[0].args) == 2
        ):
            biased[node.name] = pair
        else:
            nodes.append(replace(node, op=_MM, args=pair))
    added = {_T: ExternalOp(views=(0,)), _MM: ExternalOp(), _ADDMM: ExternalOp()}
    return replace(graph, nodes=tuple(nodes), foreign={**added, **graph.foreign})


def without_turns(graph: Graph) -> Graph:
    """The graph without transposes of transposes, which are what they are of."""
    renamed, nodes = dict[str, Value](), list[Node]()
    for node in graph.nodes:
        node = node.substitute(renamed)
        inner = graph.producers.get(node.operands[0].name) if node.op == _T else None
        if inner is not None and inner.op == _T and node.name not in graph.output_names:
            source = inner.operands[0]
            renamed[node.name] = renamed.get(source.name, source)
        else:
            nodes.append(node)
    return graph.with_nodes(nodes)


def _turned(cast: Cast, builder: Builder, node: Node, nodes: list[Node]) -> Value:
    """The matrix that a product reads: what was cast, or its transpose."""
    if not cast.is_turned:
        return cast.source
    kind = cast.source.tensor
    shape, strides = kind.shape[::-1], (kind.strides or (kind.shape[1], 1))[::-1]
    made = builder.value(f"{cast.source.name}_t", TensorType(kind.dtype, shape, strides, kind.placement))
    nodes.append(builder.typed(_T, (cast.source,), (made,), node.phase, node.origin))
    return made
