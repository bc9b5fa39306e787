"""Type rules of ops that know which part of a dim their rank has."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from zgraph.ir.axis_rules import TypeRuleError, axis_of
from zgraph.ir.graph import Node
from zgraph.ir.rules.kept import broken_rule
from zgraph.ir.rules.ranked import meant
from zgraph.ir.rules.ring import RING
from zgraph.ir.symbols import Dim
from zgraph.ir.types import DType, Grouped, Mesh, Partial, Replicate, Shard, TensorType, Type, Varying, model_axes

__all__ = ["DOCS", "OPAQUE", "ranked"]

Shapes = tuple[tuple[Dim, ...], ...]


def ranked(node: Node, mesh: Mesh) -> tuple[Type, ...]:
    """The types of what an op makes that knows its rank along the axis it names: dense, and placed by its rule."""
    index, size = axis_of(node, mesh)
    kinds = [v.type for v in node.operands]
    tensors = [kind for kind in kinds if isinstance(kind, TensorType)]
    if len(tensors) < max(len(kinds), 2) or any(t.future or len(t.placement) != len(mesh) for t in tensors):
        raise TypeRuleError("computes with tensors that are on the device, one placement a mesh axis")
    made = [r.type for r in node.results if isinstance(r.type, TensorType) and len(r.type.placement) == len(mesh)]
    if node.op in _BY_GROUPS and (wrong := _wrong_groups(node, tensors, size)):
        raise TypeRuleError(wrong)
    shapes = _SHAPES[node.op](node, tensors)
    if len(made) != len(node.results) or len(made) != len(shapes):
        raise TypeRuleError(f"makes {len(shapes)} tensors, one placement a mesh axis")
    call, num_model = meant(node), len(model_axes(mesh))
    for number in range(num_model):
        if wrong := broken_rule(call, mesh, number, knows_rank=number == index):
            raise TypeRuleError(wrong)
    data = [p for t in tensors for p in t.placement[num_model:]]
    if any(isinstance(p, Shard | Partial | Grouped) for p in data):
        raise TypeRuleError("computes with values that are whole, or a rank's own, along the axes of data")
    own = Varying() if Varying() in data else Replicate()
    placements = [(*kind.placement[:num_model], *[own] * (len(mesh) - num_model)) for kind in made]
    dtype = next((t.dtype for t in tensors if t.dtype.value.startswith(("f", "bf"))), None)
    if dtype is None:
        raise TypeRuleError("computes with floating-point numbers, and none of its tensors has any")
    strides = [kind.strides if node.op in _AS_TORCH else None for kind in made]
    dtypes = [dtype] * len(made)
    if node.op == "ring_attention" and dtype is not DType.f64:
        dtypes[1] = DType.f32
    return tuple(TensorType(*laid) for laid in zip(dtypes, shapes, strides, placements, strict=True))


def _rows(node: Node, kinds: list[TensorType]) -> Shapes:
    table, index = kinds[0].shape, kinds[1].shape
    return ((*index, *table[1:]),)


def _table(node: Node, kinds: list[TensorType]) -> Shapes:
    count = node.args[2] if len(node.args) > 2 else None
    if not isinstance(count, int) or isinstance(count, bool):
        raise TypeRuleError("needs the number of its rows")
    return ((count, kinds[0].shape[-1]),)


def _loss(node: Node, kinds: list[TensorType]) -> Shapes:
    is_each = len(node.args) > 3 and node.args[3] == 0
    return (kinds[1].shape if is_each else (), ())


def _classes(node: Node, kinds: list[TensorType]) -> Shapes:
    return (kinds[1].shape,)


def _wrong_groups(node: Node, kinds: list[TensorType], num_ranks: int) -> str:
    """Mistake in the number of matrices, one for each of the rank's groups; empty if there is none."""
    made = [r.type for r in node.results if isinstance(r.type, TensorType)]
    counts = {kind.shape[0] for kind in (*kinds, *made) if len(kind.shape) == 3}
    ends = next((kind.shape for kind in kinds if kind.dtype in (DType.i32, DType.i64)), ())
    if len(ends) != 1 or counts != {ends[0] // num_ranks} or ends[0] % num_ranks:
        return f"has a matrix for each of the groups of a rank, and {list(map(str, counts))} are none of {num_ranks}"
    return ""


def _rows_by_groups(node: Node, kinds: list[TensorType]) -> Shapes:
    """Rows times the matrix of their group; or of two matrices, one product for each group that the rank has."""
    left, right = kinds[0].shape, kinds[1].shape
    if len(right) == 3:
        return ((left[0], right[2]),)
    made = node.results[0].type if node.results else None
    if not isinstance(made, TensorType) or len(made.shape) != 3:
        raise TypeRuleError("makes a matrix for each group")
    return ((made.shape[0], left[0], right[1]),)


def _attended(node: Node, kinds: list[TensorType]) -> Shapes:
    queries, values = kinds[0].shape, kinds[2].shape
    return (*queries[:3], *values[3:]), queries[:3]


def _attended_backward(node: Node, kinds: list[TensorType]) -> Shapes:
    return kinds[1].shape, kinds[2].shape, kinds[3].shape


def _as_given(node: Node, kinds: list[TensorType]) -> Shapes:
    return kinds[0].shape, kinds[1].shape


_SHAPES: Mapping[str, Callable[[Node, list[TensorType]], Shapes]] = {
    "part_embedding": _rows,
    "part_int8_embedding": _rows,
    "part_embedding_backward": _table,
    "part_nll_loss": _loss,
    "part_nll_loss_backward": _classes,
    "part_grouped_mm": _rows_by_groups,
    "part_grouped_mm_fallback": _rows_by_groups,
    "part_grouped_mm_fallback_backward": _as_given,
    "ring_attention": _attended,
    "ring_attention_backward": _attended_backward,
}

_BY_GROUPS = frozenset(op for op in _SHAPES if op.startswith("part_grouped"))
"""Products of groups."""

_AS_TORCH = _BY_GROUPS | frozenset(RING.values())
"""Those whose results lie in memory as the op of torch has them."""

OPAQUE = frozenset({"part_grouped_mm_fallback", "part_grouped_mm_fallback_backward", *RING.values()})
"""Those that stand for ops that torch has from elsewhere, or send to other ranks: neither moved, merged nor removed."""

DOCS: Mapping[str, str] = {
    "part_embedding": "Look up rows of a table of which the rank has a part: zeros for rows of other ranks.",
    "part_int8_embedding": "The same of a table in int8, with a scale for each row.",
    "part_embedding_backward": "The gradient of the rank's rows of a table.",
    "part_nll_loss": "The negative log likelihood of those labels that the rank has the classes of.",
    "part_nll_loss_backward": "Its backward: zeros for labels whose classes other ranks have.",
    "part_grouped_mm": "Rows times the matrix of their group, of the groups whose matrices the rank has.",
    "part_grouped_mm_fallback": "The same, as transformers has it for floats that torch has no kernel for.",
    "part_grouped_mm_fallback_backward": "The gradients of its rows, and of the rank's matrices.",
    "ring_attention": "Attention of the rank's tokens to those of all ranks, whose keys and values go round.",
    "ring_attention_backward": "The gradients of its queries, keys and values.",
}
"""A line of what each op does."""
